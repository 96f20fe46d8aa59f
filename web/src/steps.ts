// Where the steps of a measure lie along its dimensions, and what the answer keeps along them.

import { array, summary } from "./api";
import type { Line } from "./charts/lines";
import { set, statistic } from "./data";
import { percent } from "./format";
import type { Selection, Study, Summary } from "./types";

/** The numbers that the places along a dimension stand for; counted from 0 where the study says none. */
export const stepsAlong = (study: Study, dim: string): number[] =>
  study.places[dim]?.map(Number) ?? Array.from({ length: study.sizes[dim] ?? 0 }, (_, at) => at);

/** What a place along a dimension is called. */
export function placeName(study: Study, dim: string, at: number): string {
  const place = study.places[dim]?.[at];
  if (place === undefined) return String(at);
  if (dim === "amount") return percent(Number(place), 0);
  return String(place).replaceAll("_", " ");
}

/** A curve that begins with the intact image. */
export const fromIntact = (intact: number, values: ArrayLike<number>): Float32Array =>
  Float32Array.from([intact, ...Array.from(values)]);

/** The label's probability, intact and then at the steps of each measure: of the image at hand, or the mean over the
 * selection with its interval. */
export async function probabilityCurves(
  measures: string[],
  { scope, image }: { scope: "image" | "set"; image: string },
  selection: Selection,
): Promise<{ n: number; curves: Pick<Line, "y" | "low" | "high">[] }> {
  const names = ["probability", ...measures];
  if (scope === "image") {
    const [plain, ...changed] = await Promise.all(names.map((name) => array(name, { image })));
    return { n: 1, curves: changed.map(({ values }) => ({ y: fromIntact(plain!.values[0]!, values) })) };
  }
  const chosen = set(selection);
  const [plain, ...changed] = await Promise.all(names.map((name) => summary(name, chosen)));
  const from = (each: Summary, name: "mean" | "low" | "high") =>
    fromIntact(statistic(plain!, name)[0]!, statistic(each, name));
  const curves = changed.map((each) => ({ y: from(each, "mean"), low: from(each, "low"), high: from(each, "high") }));
  return { n: plain!.n_images, curves };
}
