// What several views ask of the study, put together from the server's arrays.

import { array, ids, summary, type SummaryAsk } from "./api";
import { STATISTICS, type Context, type Facts, type Images, type Selection, type Statistic, type Study, type Summary } from "./types";

/** One number per head, [layer, head], NaN where a layer has no such head; with an interval if it is a mean. */
export interface HeadValues {
  values: Float32Array;
  low?: Float32Array;
  high?: Float32Array;
  n: number;
  interval?: string;
}

export const set = (selection: Selection): SummaryAsk => {
  if (!selection.indices.length) throw new Error("No image matches the selection. Loosen a filter or clear it (Esc).");
  return selection.all ? {} : { set: { key: selection.key, images: selection.indices } };
};

export const statistic = (told: Summary, name: Statistic): Float32Array => {
  const size = told.values.length / STATISTICS.length;
  const at = STATISTICS.indexOf(name);
  return (told.values as Float32Array).subarray(at * size, (at + 1) * size);
};

/** A measure of every head: of the image at hand, or its mean over the selection. */
export async function headValues(name: string, scope: "image" | "set", image: string, selection: Selection): Promise<HeadValues> {
  if (scope === "image") return { values: Float32Array.from((await array(name, { image })).values), n: 1 };
  const told = await summary(name, set(selection));
  const [values, low, high] = (["mean", "low", "high"] as const).map((wanted) => statistic(told, wanted));
  return { values: values!, low: low!, high: high!, n: told.n_images, interval: told.interval };
}

/** What the measure reads with nothing pruned: the probability itself, 0 for a change, nothing for what is no change. */
export function unpruned(name: string, scope: "image" | "set", { images, selection, facts }: Context): number | undefined {
  if (name !== "head_probability") return name.startsWith("head_") ? 0 : undefined;
  const { probability } = images;
  if (scope === "image") return facts?.probability;
  if (!probability || !selection.indices.length) return undefined;
  return selection.indices.reduce((sum, image) => sum + probability[image]!, 0) / selection.indices.length;
}

/** Label, prediction and probability of the image at hand. */
export async function facts(image: string, images: Images, about: Study): Promise<Facts> {
  if (!image.startsWith("u")) {
    const at = Number(image);
    const named = (await ids())[at] ?? image;
    return { image, label: images.label[at]!, prediction: images.prediction?.[at], probability: images.probability?.[at], id: named };
  }
  const one = async (name: string) => (name in about.measures ? (await array(name, { image })).values[0] : undefined);
  const [label, prediction, probability] = await Promise.all([one("label"), one("prediction"), one("probability")]);
  return { image, label: label ?? -1, prediction, probability, id: "your photograph" };
}

/** The image `steps` further among the selected ones, in their order; round at the ends. */
export function stepped(image: string, steps: number, { indices }: Selection): string {
  if (!indices.length) return image;
  const at = indices.findIndex((index) => index >= Number(image));
  const exact = at >= 0 && indices[at] === Number(image);
  const from = at < 0 ? indices.length : at;
  const to = exact || steps < 0 ? from + steps : from;
  return String(indices[(to + indices.length) % indices.length]);
}

/** Bins of equal width from the least to the greatest value, counting all and those under `mask`. */
export function binned(values: ArrayLike<number>, n: number, mask?: Uint8Array, domain?: [number, number]) {
  let [low, high] = domain ?? [Infinity, -Infinity];
  if (!domain) {
    for (let i = 0; i < values.length; i++) {
      low = Math.min(low, values[i]!);
      high = Math.max(high, values[i]!);
    }
  }
  if (!(high > low)) [low, high] = [low - 0.5 || 0, high + 0.5 || 1];
  const width = (high - low) / n;
  const bins = Array.from({ length: n }, (_, i) => ({ low: low + i * width, high: low + (i + 1) * width, all: 0, chosen: 0 }));
  for (let i = 0; i < values.length; i++) {
    const bin = bins[Math.min(n - 1, Math.floor((values[i]! - low) / width))];
    if (!bin) continue;
    bin.all++;
    if (mask?.[i]) bin.chosen++;
  }
  return bins;
}
