// The comparison with the other study, and which of its measures is looked at.

import { comparison } from "../../api";
import { load, type Loaded } from "../../load.svelte";
import { shared } from "../../state.svelte";
import type { ComparedMeasure, Comparison, Measure, NamedArray, Study } from "../../types";

/** Call it as a component starts. */
export const comparing = (): Loaded<Comparison> => load(() => comparison(shared.other));

/** The chosen measure if `fits`, else the first that does: the one that differs most. */
export function chosenMeasure(
  comparison: Comparison | undefined,
  fits: (measure: ComparedMeasure) => boolean = () => true,
): ComparedMeasure | undefined {
  const fitting = comparison?.measures.filter(fits) ?? [];
  return fitting.find(({ name }) => name === shared.measure) ?? fitting[0];
}

/** A measure of one image in the unit of the comparison: lengths in patches are shares of the image's side where the
 * patches of the two studies are not all alike. */
export function inUnitOfComparison(
  study: Pick<Study, "grids">,
  measure: Measure,
  array: NamedArray,
  unit: string | undefined,
): { measure: Measure; array: NamedArray } {
  const first = study.grids.find((grid) => grid !== null);
  if (!unit || !first || !measure.unit.startsWith("patches") || unit.startsWith("patches")) return { measure, array };
  const side = 1 / Math.sqrt(first[0] * first[1]);
  const values = Float32Array.from(array.values, (length) => length * side);
  return { measure: { ...measure, unit }, array: { ...array, values } };
}

/** The mean difference on the axis of effects: infinite where it is the same in every image, nothing where no image
 * differs. */
export function effectOf({ standardised, alike, mean_difference }: ComparedMeasure): number {
  if (alike) return Math.sign(mean_difference ?? NaN) * Infinity;
  return standardised ?? NaN;
}

/** A difference with its sign. */
export const signed = (value: number | null, format: (value: number) => string): string =>
  value === null ? "–" : value > 0 ? `+${format(value)}` : value < 0 ? `−${format(-value)}` : "0";
