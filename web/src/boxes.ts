// Windows of one patch as boxes on the grid. Pure.

import type { NamedArray } from "./types";

export interface Box {
  head: number;
  left: number;
  top: number;
  width: number;
  height: number;
  /** Share of the grid. */
  area: number;
}

/** The windows of a patch by head, from [head, patch, side] with sides left, top, right, bottom of the patch, cut at the
 * border. */
export function boxesOf({ shape, values }: NamedArray, heads: number, patch: number, grid: [number, number]): Box[] {
  const [, nPatches] = shape as [number, number, number];
  const [row, column] = [Math.floor(patch / grid[1]), patch % grid[1]];
  const inside = (at: number, n: number) => Math.max(0, Math.min(n - 1, at));
  return Array.from({ length: heads }, (_, head): Box => {
    const [left, top, right, bottom] = Array.from(
      { length: 4 },
      (_, side) => values[4 * (head * nPatches + patch) + side]!,
    );
    const [x0, x1] = [inside(column - left!, grid[1]), inside(column + right!, grid[1])];
    const [y0, y1] = [inside(row - top!, grid[0]), inside(row + bottom!, grid[0])];
    const [width, height] = [x1 - x0 + 1, y1 - y0 + 1];
    return { head, left: x0, top: y0, width, height, area: (width * height) / (grid[0] * grid[1]) };
  });
}
