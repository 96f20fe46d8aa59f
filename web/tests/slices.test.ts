import { expect, test } from "vitest";

import { hasMean, layerMeans, layoutOf, slice } from "../src/slices";
import type { Measure, NamedArray, Study } from "../src/types";

/** Each value is its own indices, written as digits: layer, head, patch. */
const digits: NamedArray = {
  dims: ["layer", "head", "patch"],
  shape: [2, 3, 4],
  values: Float32Array.from(
    { length: 24 },
    (_, at) => Math.floor(at / 12) * 100 + (Math.floor(at / 4) % 3) * 10 + (at % 4),
  ),
};

test("a slice holds the values of the chosen indices", () => {
  expect([...slice(digits, ["patch"], { layer: 1, head: 2 })]).toEqual([120, 121, 122, 123]);
  expect([...slice(digits, ["layer", "head"], { patch: 3 })]).toEqual([3, 13, 23, 103, 113, 123]);
  expect([...slice(digits, ["head", "layer"], { patch: 0 })]).toEqual([0, 100, 10, 110, 20, 120]);
});

test("an index past the end is the last, one that is not chosen the first", () => {
  expect([...slice(digits, ["layer"], { head: 9 })]).toEqual([20, 120]);
});

test("a dimension that the array lacks is an error", () => {
  expect(() => slice(digits, ["hop"], {})).toThrow("has no hop");
});

test.each([
  [["image", "layer", "head"], "heads", ["layer", "head"], []],
  [["layer", "head"], "heads", ["layer", "head"], []],
  [["image", "layer", "head", "hop"], "heads", ["layer", "head"], ["hop"]],
  [["image", "layer"], "line", ["layer"], []],
  [["image", "layer", "amount"], "line", ["layer"], ["amount"]],
  [["image", "amount"], "line", ["amount"], []],
  [["image", "layer", "patch"], "photograph", ["patch"], ["layer"]],
  [["image", "layer", "head", "patch", "side"], "photograph", ["patch"], ["layer", "head", "side"]],
  [["image", "layer", "token"], "photograph", ["token"], ["layer"]],
  [["image"], "one number", [], []],
])("%j is drawn as %s", (dims, drawing, shown, chosen) => {
  expect(layoutOf(dims)).toEqual({ drawing, shown, chosen });
});

const of = (...dims: string[]) => ({ dims: ["image", "layer", ...dims], unit: "1" });

test("lengths of boxes and arrows, which come in patches of each layer, have means in patches of the first", () => {
  const study = { prefixes: [0, 0], grids: [[4, 4], [2, 2]] } as unknown as Study; // prettier-ignore
  const values = Float32Array.from({ length: 2 * 16 * 2 }, (_, at) => (at % 2 ? 0 : 1));
  const arrows: NamedArray = { dims: ["layer", "patch", "xy"], shape: [2, 16, 2], values };
  const measure = { ...of("patch", "xy"), unit: "patches of L0, x to the right, y down" };
  expect([...layerMeans(arrows, study, {}, measure)]).toEqual([1, 2]);
  expect([...layerMeans(arrows, study, {}, of("patch", "xy"))]).toEqual([1, 1]);
  const sides: NamedArray = { dims: ["layer", "patch", "side"], shape: [2, 16, 2], values: values.map(() => 3) };
  const box = { ...of("patch", "side"), unit: "patches of L0 left, top" };
  expect([...layerMeans(sides, study, { side: 1 }, box)]).toEqual([3, 6]);
  const converted: NamedArray = { dims: ["layer", "patch"], shape: [2, 16], values: values.subarray(0, 32).fill(5) };
  expect([...layerMeans(converted, study, {}, { ...of("patch"), unit: "patches of L0" })]).toEqual([5, 5]);
});

test("means over a photograph's patches leave prefix tokens and padding out, and take the length of vectors", () => {
  const study = {
    prefixes: [2, 2],
    grids: [
      [2, 2],
      [1, 2],
    ],
  } as unknown as Study;
  const tokens: NamedArray = {
    dims: ["layer", "token"],
    shape: [2, 6],
    values: Float32Array.from([9, 8, 1, 2, 3, 4, 9, 8, 5, 7, NaN, NaN]),
  };
  expect([...layerMeans(tokens, study, {}, of("token"))]).toEqual([2.5, 6]);
  const vectors: NamedArray = {
    dims: ["layer", "patch", "xy"],
    shape: [1, 4, 2],
    values: Float32Array.from([3, 4, 0, 0, 0, 1, 0, 2]),
  };
  expect([...layerMeans(vectors, study, {}, of("patch", "xy"))]).toEqual([2]);
});

test("a class token that a layer returns alone, or beside merged patches, is no patch", () => {
  const late = {
    class_token: true,
    prefixes: [0, 0, 0],
    grids: [
      [2, 2],
      [2, 2],
      [1, 2],
    ],
  } as unknown as Study;
  const tokens: NamedArray = {
    dims: ["layer", "token"],
    shape: [3, 4],
    // Four patches; two of the next layer's grid; the class token alone.
    values: Float32Array.from([1, 2, 3, 6, 4, 5, NaN, NaN, 16, NaN, NaN, NaN]),
  };
  expect([...layerMeans(tokens, late, {}, of("token"))]).toEqual([3, 4.5, NaN]);
});

test("a class has no mean, and neither has what is not of images", () => {
  const measure = (is_quantity: boolean, dims = ["image", "layer"]) => ({ is_quantity, dims }) as Measure;
  expect(hasMean(measure(true))).toBe(true);
  expect(hasMean(measure(false))).toBe(false);
  expect(hasMean(measure(true, ["layer", "head"]))).toBe(false);
});
