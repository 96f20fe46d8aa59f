// The comparison with the other study, and which of its measures is looked at.

import { comparison } from "../../api";
import { load, type Loaded } from "../../load.svelte";
import { shared } from "../../state.svelte";
import type { ComparedMeasure, Comparison } from "../../types";

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

/** A difference with its sign. */
export const signed = (value: number | null, format: (value: number) => string): string =>
  value === null ? "–" : value > 0 ? `+${format(value)}` : value < 0 ? `−${format(-value)}` : "0";
