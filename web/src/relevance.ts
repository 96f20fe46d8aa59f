// Curves of deletion and insertion as lines: a line a method, and one band for all random orders. Pure.

import type { Line } from "./charts/lines";
import type { NamedArray } from "./types";

const COLOURS: Record<string, number | undefined> = {
  raw: 2,
  rollout: 5,
  grad_sam: 3,
  lrp: 1,
  self_similarity: 0,
  prototype_similarity: 6,
};

export function relevanceLines({ shape, values }: NamedArray, methods: string[]): Line[] {
  const nSteps = shape[1]!;
  const row = (at: number) => values.subarray(at * nSteps, (at + 1) * nSteps);
  const random = methods.flatMap((name, at) => (name.startsWith("random") ? [row(at)] : []));
  const over = (of: (...numbers: number[]) => number) =>
    Float32Array.from({ length: nSteps }, (_, step) => of(...random.map((each) => each[step]!)));
  const mean = (...numbers: number[]) => numbers.reduce((sum, value) => sum + value, 0) / numbers.length;
  const own = methods.flatMap((name, at): Line[] => {
    if (name.startsWith("random")) return [];
    const colour = COLOURS[name];
    return [{ name, y: row(at), ...(colour === undefined ? {} : { colour }) }];
  });
  if (!random.length) return own;
  const band = { low: over(Math.min), high: over(Math.max) };
  return [{ name: "random", y: over(mean), ...band, colour: 4, dashed: true }, ...own];
}
