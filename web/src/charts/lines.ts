// Several quantities over one axis, as a chart draws them. Pure.

import type { Row } from "../export";

export interface Line {
  name: string;
  y: ArrayLike<number>;
  low?: ArrayLike<number> | undefined;
  high?: ArrayLike<number> | undefined;
  /** An index into the page's colours of groups; the accent where absent. */
  colour?: number;
  dashed?: boolean;
}

/** Least and greatest of all lines and bands, gaps left out. */
export function boundsOf(lines: Line[], fixed?: [number, number]): [number, number] {
  if (fixed) return fixed;
  const values = lines
    .flatMap(({ y, low, high }) => [y, low, high].flatMap((each) => (each ? Array.from(each) : [])))
    .filter((value) => Number.isFinite(value));
  return values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
}

/** The last step at which a line has a value; -1 for none. */
export function lastStep(y: ArrayLike<number>): number {
  for (let at = y.length - 1; at >= 0; at--) if (Number.isFinite(y[at]!)) return at;
  return -1;
}

/** Heights for labels that want to stand at `wanted`: in their order, at least `gap` apart, none below `bottom`. */
export function spread(wanted: number[], gap: number, bottom: number): number[] {
  const order = wanted.map((_, at) => at).sort((a, b) => wanted[a]! - wanted[b]! || a - b);
  const placed = [...wanted];
  order.forEach((at, i) => {
    if (i) placed[at] = Math.max(placed[at]!, placed[order[i - 1]!]! + gap);
  });
  let limit = bottom;
  for (const at of [...order].reverse()) {
    placed[at] = Math.min(placed[at]!, limit);
    limit = placed[at]! - gap;
  }
  return placed;
}

/** Lines as a table, a row a step. */
export const lineRows = (step: string, at: ArrayLike<number>, lines: Line[]): Row[] =>
  Array.from(at, (value, i) => ({
    [step]: value,
    ...Object.fromEntries(lines.map(({ name, y }) => [name, y[i] ?? NaN])),
  }));
