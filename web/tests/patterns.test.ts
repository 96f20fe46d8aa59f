import { expect, test } from "vitest";

import { boxesOf } from "../src/boxes";
import { byWeight, linksOf } from "../src/links";
import { matrixPixels, scaleTop, thickened } from "../src/matrix";
import { asGrid, cellText, counted, pixelsOf, type NamedHead } from "../src/patterns";

const named = (layer: number, head: number, name: string, label = name): NamedHead => ({
  layer,
  head,
  name,
  label,
  rule: "",
});
const heads = [named(0, 0, "self"), named(0, 1, "shift", "shift (+1, 0)"), named(1, 0, "row band")];
const names = ["self", "shift", "row band"];

test("names are cells of the grid of heads, with gaps where a layer lacks a head", () => {
  expect([...asGrid(heads, names, 2, 2)]).toEqual([0, 1, 2, NaN]);
  expect(counted([...heads, named(1, 1, "self")], [...names, "sink"])).toEqual([
    { name: "self", n: 2 },
    { name: "shift", n: 1 },
    { name: "row band", n: 1 },
  ]);
  expect(heads.map(cellText)).toEqual(["self", "(+1, 0)", "row"]);
});

test("the landscape stands upright and leaves out what single maps blur", () => {
  const map = { n_maps: 3, x: [0, 1], y: [0, 1], shape: [2, 2], height: [1, 0, 0.01, 0], clusters: [] };
  const alphas = [...pixelsOf(map as never)].filter((_, i) => i % 4 === 3);
  expect(alphas).toEqual([0, 0, 190, 0]);
});

test("tokens before the patches are drawn several times, all others once", () => {
  expect(thickened(3, 1)).toEqual([0, 1, 2]);
  expect(thickened(100, 1).slice(0, 5)).toEqual([0, 0, 0, 1, 2]);
  expect([scaleTop([0.2, 0.3], 100), scaleTop([0.2, 0.3], 5), scaleTop([0.2], 100, 0.1)]).toEqual([0.3, 0.8, 0.1]);
  const data = matrixPixels([1, 0.25, 0, NaN], 2, [0, 1], 1);
  expect([...data].filter((_, i) => i % 4 === 3)).toEqual([255, 128, 0, 0]);
});

test("windows of a patch are boxes on the grid, cut at its border", () => {
  const values = Float32Array.from([0, 0, 0, 0, 0, 0, 9, 1, 0, 0, 0, 0, 9, 9, 9, 9]);
  const boxes = boxesOf({ dims: [], shape: [2, 2, 4], values }, 2, 1, [2, 4]);
  expect(boxes[0]).toEqual({ head: 0, left: 1, top: 0, width: 3, height: 2, area: 0.75 });
  expect(boxes[1]!.area).toBe(1);
});

test("links are exactly the strongest share of the cells, weak ones first, in groups of like weight", () => {
  const map = [0.1, 0.6, 0.3, 0.2, 0.2, 0.6, 0.5, 0.4, 0.1];
  const links = linksOf(map, 3, 0.4);
  expect(links.map(({ key, query, weight }) => [key, query, weight])).toEqual([
    [0, 2, 0.5],
    [1, 0, 0.6],
    [2, 1, 0.6],
  ]);
  expect(byWeight(links, 2).map((group) => group.length)).toEqual([2, 1]);
  expect([linksOf(map, 3, 0.05), byWeight([], 4)]).toEqual([[], []]);
});
