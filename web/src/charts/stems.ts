// Heads in the order in which a lollipop chart draws them.

export interface Stem {
  /** layer * heads + head. */
  at: number;
  value: number;
  low: number;
  high: number;
  /** The interval holds zero. */
  uncertain: boolean;
}

/** The heads that are there, from the highest value down, or in order of layers. Ends that are not known are the value. */
export function stems(
  values: ArrayLike<number>,
  low: ArrayLike<number> | undefined,
  high: ArrayLike<number> | undefined,
  byLayer: boolean,
): Stem[] {
  const known = (end: number | undefined, value: number) => (end === undefined || Number.isNaN(end) ? value : end);
  const list = Array.from({ length: values.length }, (_, at): Stem => {
    const value = values[at]!;
    const [from, to] = [known(low?.[at], value), known(high?.[at], value)];
    return { at, value, low: from, high: to, uncertain: isUncertain(low?.[at], high?.[at]) };
  }).filter(({ value }) => !Number.isNaN(value));
  return byLayer ? list : list.sort((a, b) => b.value - a.value || a.at - b.at);
}

/** Whether an interval holds zero, or there is none because images are too few. */
export const isUncertain = (low: number | undefined, high: number | undefined): boolean =>
  low !== undefined && high !== undefined && !(low > 0 || high < 0);
