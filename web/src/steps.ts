// Where the steps of a measure lie along dimensions of which the store holds the order alone, as docs/measures.md says;
// and what the answer keeps along them.

import { array, summary } from "./api";
import type { Line } from "./charts/lines";
import { set, statistic } from "./data";
import { gridOf } from "./grids";
import type { Selection, Study, Summary } from "./types";

/** Shares of the patches that are lost, along `amount`. */
export const AMOUNTS = [0.25, 0.5, 0.75];
const CELLS = [2, 4, 7, 14];

/** Cells a side, along `cells`: those that divide the first layer's grid. */
export function cellsOf(study: Study): number[] {
  const [rows, columns] = gridOf(study, 0);
  return CELLS.filter((cells) => rows % cells === 0 && columns % cells === 0);
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
