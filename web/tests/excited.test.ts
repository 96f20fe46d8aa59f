import { expect, test } from "vitest";

import { excited, peakLayer, singled } from "../src/excited";
import type { Study } from "../src/types";

test("the selected photographs come in the order of a neuron's peak", () => {
  const peaks = Float32Array.from([3, NaN, 5, 4, 5]);
  const patches = Int32Array.from([9, 8, 7, 6, 5]);
  expect(excited(peaks, patches, Int32Array.from([0, 1, 2, 4]))).toEqual([
    { image: 2, patch: 7, value: 5 },
    { image: 4, patch: 5, value: 5 },
    { image: 0, patch: 9, value: 3 },
  ]);
});

test("a photograph singles out the neuron that is furthest beyond its usual range", () => {
  const [low, middle, high] = [
    [0, 0, 1],
    [1, 5, 1],
    [2, 10, 1],
  ];
  expect(singled([3, 11, 9], low!, middle!, high!)).toBe(0);
});

test("peaks lie on the grid of the layer that was read, not of the last", () => {
  const pyramid = [
    [6, 6],
    [6, 6],
    [3, 3],
  ];
  const about = (grids: number[][], own_grid_layers: number[] | null) =>
    ({ grids, own_grid_layers }) as unknown as Study;
  expect(peakLayer(about(pyramid, [0, 1]))).toEqual({ name: "L1", layer: 1, grid: [6, 6] });
  expect(peakLayer(about(pyramid, null)).grid).toBeUndefined();
  expect(peakLayer(about([pyramid[0]!, pyramid[1]!], null))).toMatchObject({ layer: undefined, grid: [6, 6] });
});
