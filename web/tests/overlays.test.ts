import { expect, test } from "vitest";

import { glance } from "../src/attention";
import { stems } from "../src/charts/stems";
import { mapLayout, numberLayout } from "../src/charts/cells";
import { amongPatches, evenly, headPaint, MeanMaps, topOf } from "../src/headmaps.svelte";
import { betweenPatches } from "../src/overlays/attention";
import {
  beyondGrid,
  beyondGridOf,
  drawnPatch,
  layerAtDepth,
  patchesOf,
  patchScale,
  positionAt,
  tokenIn,
  tokenOfPatch,
} from "../src/grids";
import {
  coverage,
  directionColour,
  flow,
  inOneScale,
  isBlank,
  longest,
  MOST,
  opacity,
  pixels,
  sharedTop,
} from "../src/overlays/paint";
import { chosenOverlay, listed } from "../src/overlays/registry";
import type { Overlay } from "../src/overlays/overlay";
import { asFlow, stored, storedOverlays } from "../src/overlays/stored";
import { effectOf, inUnitOfComparison } from "../src/views/compare/compared.svelte";
import { measuresOf } from "../src/views/reach";
import type { ComparedMeasure, Measure, Study } from "../src/types";

const measure = (dims: string) => ({
  dims: dims.split(" "),
  title: dims,
  unit: "1",
  low: "",
  high: "",
  source: "",
  limits: "",
  baseline: "",
  analysis: "patches",
});
const study = {
  class_token: true,
  n_heads: [2, 2],
  grids: [
    [1, 3],
    [1, 3],
  ],
  prefixes: [1, 1],
  measures: {
    size: measure("image layer patch"),
    norm: measure("image layer token"),
    pull: measure("image layer patch xy"),
    box: measure("image layer patch side"),
    sum: measure("image layer"),
    from_outside: measure("image layer head"),
  },
  analyses: [
    {
      name: "patches",
      title: "Patches",
      measures: ["size", "pull", "box", "sum"],
      stored: ["size", "pull", "box", "sum"],
    },
    { name: "tokens", title: "Tokens", measures: ["norm"], stored: ["norm"] },
    { name: "mine", title: "Mine", measures: ["from_outside"], stored: ["from_outside"] },
  ],
} as unknown as Study;

test("less than the floor is not drawn, the top is, and the photograph shows through", () => {
  expect(opacity(0.01, 0.02, 0.1)).toBe(0);
  expect(opacity(0.1, 0.02, 0.1)).toBe(MOST);
  expect(opacity(9, 0.02, 0.1)).toBe(MOST);
  expect(opacity(0.06, 0.02, 0.1)).toBeCloseTo(MOST / 2);
  expect([opacity(NaN, 0, 1), opacity(1, 1, 1)]).toEqual([0, 0]);
  const base = { grid: [1, 2] as [number, number], what: "" };
  expect([...pixels({ kind: "marks", ...base, on: Uint8Array.from([0, 1]) })!].filter((_, i) => i % 4 === 3)[0]).toBe(
    0,
  );
});

test("a shared scale ends where all but a few values stay below", () => {
  const values = Float32Array.from({ length: 1000 }, (_, i) => i);
  expect(sharedTop(values)).toBe(995);
  expect(sharedTop([NaN, 3])).toBe(3);
  expect(sharedTop([NaN, NaN])).toBe(1);
  const mixed = Float32Array.from({ length: 2003 }, (_, i) => (i % 7 ? ((i * 7919) % 2003) / 2003 : NaN));
  const sorted = mixed.filter((value) => !Number.isNaN(value)).sort();
  expect(sharedTop(mixed)).toBe(sorted[Math.floor(0.995 * sorted.length)]);
  expect(mixed.filter(Number.isNaN)).toHaveLength(287); // the map itself is not sorted
  expect(mixed[1]).toBeCloseTo(7919 / 2003 - 3, 6);
});

test("a row is where a token looks, a column who looks at it, prefix tokens apart", () => {
  const map = Float32Array.from({ length: 16 }, (_, i) => i);
  expect([...glance(map, 4, 1, 2, false).patches]).toEqual([9, 10, 11]);
  expect([...glance(map, 4, 1, 2, false).prefix]).toEqual([8]);
  expect([...glance(map, 4, 1, 2, true).patches]).toEqual([6, 10, 14]);
  expect([...betweenPatches(map, 4, 1)]).toEqual([1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15]);
});

test("every measure of patches or tokens is an overlay on the tab of its analysis", () => {
  const overlays = storedOverlays(study);
  expect(overlays.map(({ id, tabs }) => [id, ...tabs])).toEqual([
    ["size", "patches"],
    ["norm", "tokens"],
    ["pull", "patches"],
    ["box", "patches"],
    ["box-sum", "patches"],
  ]);
  expect(overlays.map(({ perToken }) => perToken)).toEqual([false, false, false, true, false]);
});

test("a stored array is painted by its dimensions, layer by layer", () => {
  const paint = (name: string, shape: number[], values: number[] | Uint8Array) => {
    const array = { dims: [], shape, values: values instanceof Uint8Array ? values : Float32Array.from(values) };
    return stored(study, study.measures[name]!, array, 1);
  };
  const size = paint("size", [2, 3], [9, 9, 9, 1, 2, 3]).paint(0, true);
  expect(size?.kind === "weights" && [...size.values, size.floor, size.top]).toEqual([1, 2, 3, 1, 3]);
  const norm = paint("norm", [2, 4], [9, 9, 9, 9, 7, 1, 2, 3]).paint(0, false);
  expect(norm?.kind === "weights" && [norm.prefix[0]?.name, norm.prefix[0]?.value, norm.values[0]]).toEqual([
    "class token",
    7,
    1,
  ]);
  expect(paint("norm", [2, 4], [9, 9, 9, 9, 7, 1, 2, NaN]).paint(0, false)).toBeUndefined(); // merged: on no grid
  const marks = paint("size", [2, 3], Uint8Array.from([1, 1, 1, 0, 1, 0])).paint(0, false);
  expect(marks?.kind === "marks" && [...marks.on]).toEqual([0, 1, 0]);
  const box = paint(
    "box",
    [2, 3, 4],
    Array.from({ length: 24 }, (_, i) => i),
  );
  const sides = box.paint(2, false);
  expect(sides?.kind === "box" && sides.sides).toEqual([16, 17, 18, 19]);
  expect(box.strip!(0, 1)?.kind).toBe("box");
});

test("a patch is read and picked where it is drawn, also on another grid than its layer's", () => {
  const merging = { ...study, grids: [[4, 4], [2, 2]], prefixes: [1, 1] } as unknown as Study; // prettier-ignore
  const values = Float32Array.from([9, 10, 11, 12, 13, ...Array(12).fill(NaN), ...Array(17).fill(0)]);
  const paint = stored(merging, study.measures.norm!, { dims: [], shape: [2, 17], values }, 0).paint(1, false)!;
  expect(paint.grid).toEqual([2, 2]);
  const drawn = drawnPatch(merging, 0, 1 + 8, paint.grid); // row 2, column 0 of 4 x 4
  expect(paint.kind === "weights" && paint.values[drawn]).toBe(12);
  expect(tokenOfPatch(merging, 0, drawn, paint.grid)).toBe(1 + 8);
  expect(drawnPatch(merging, 0, 0, paint.grid)).toBe(-1);
  expect(tokenIn(merging, 1 + 8, 0, 1)).toBe(1 + 2);
  expect(tokenIn({ ...study, prefixes: [0, 1] }, 2, 0, 1)).toBe(1 + 2); // a class token that joins late
});

test("an overlay asked for is drawn, else the tab's first that needs no closed model", () => {
  const overlay = (id: string, tab: string, live: boolean) => ({ id, tabs: [tab], live }) as unknown as Overlay;
  const all = [overlay("looks", "heads", true), overlay("size", "patches", false)];
  expect(chosenOverlay(all, "size", "heads", true)?.id).toBe("size");
  expect(chosenOverlay(all, "", "patches", true)?.id).toBe("size");
  expect(chosenOverlay(all, "", "heads", false)?.id).toBe("looks");
  expect(chosenOverlay(all, "none", "heads", true)).toBeUndefined();
  expect(listed(all, "heads").others.map(({ id }) => id)).toEqual(["size"]);
});

test("measures of an analysis from outside stand on the tab of what they measure", () => {
  expect(measuresOf("heads", study)).toEqual([{ title: "Mine", names: ["from_outside"] }]);
  expect(measuresOf("patches", study)[0]?.names).toEqual(["size", "pull", "box", "sum"]);
});

test("heads are sorted from the highest value, and one whose interval holds zero is uncertain", () => {
  const list = stems([0.1, 0.3, NaN, 0], [0.05, -0.1, NaN, NaN], [0.2, 0.6, NaN, NaN], false);
  expect(list.map(({ at, uncertain }) => [at, uncertain])).toEqual([
    [1, true],
    [0, false],
    [3, true],
  ]);
  expect(stems([0.1, 0.3], undefined, undefined, true).map(({ at, uncertain }) => [at, uncertain])).toEqual([
    [0, false],
    [1, false],
  ]);
});

test("images of a mean are spread over the selection, and the mean is of those that came", () => {
  expect(evenly(Int32Array.from([3, 5, 9, 11, 20]), 3)).toEqual([3, 9, 20]);
  expect(evenly(Int32Array.from([3]), 16)).toEqual([3]);
  const mean = new MeanMaps();
  const maps = (values: number[]) => ({ dims: [], shape: [1, 2, 3], values: Float32Array.from(values) });
  mean.put(maps([1, 2, 3, NaN, 0, 0]));
  const two = mean.put(maps([3, 2, 1, NaN, 0, 0]));
  expect([...two.values.subarray(0, 3), two.n]).toEqual([2, 2, 2, 2]);
  const shares = amongPatches(mean.put(maps([5, 2, 5, NaN, 0, 0])));
  // The means are 3, 2 and 3: of the attention on patches 3/8, 2/8 and 3/8; even is a third.
  expect([...shares.values.subarray(0, 3)]).toEqual([0.375, 0.25, 0.375]);
  expect(headPaint(shares, 1, study, 1)).toBeUndefined();
  const paint = headPaint(shares, 0, study, undefined);
  expect(paint?.floor).toBe(1 / 3);
  expect(paint?.top).toBeCloseTo(0.4);
  expect([isBlank(paint), isBlank({ ...paint!, floor: 0.5 }), isBlank(undefined)]).toEqual([false, true, false]);
});

test("the scale that small maps share ends at four times even attention, whatever sinks get", () => {
  const maps = (values: number[]) => ({
    shape: [2, 1, 3] as [number, number, number],
    values: Float32Array.from(values),
    n: 1,
  });
  // A sink with all of the attention has three times even on three patches; of two layers the larger counts.
  expect(topOf(maps([0.3, 0.3, 0.4, 0.5, 0.25, 0.25]), study)).toBeCloseTo(1.5);
  const wide = { ...study, grids: [[1, 9], [1, 9]] } as unknown as Study; // prettier-ignore
  expect(topOf({ shape: [1, 1, 9], values: new Float32Array(9).fill(0).fill(1, 8), n: 1 }, wide)).toBe(4);
  expect(headPaint(maps([0.3, 0.3, 0.4, 1, 0, 0]), 1, study, 2)?.top).toBeCloseTo(2 / 3);
});

test("small maps of few heads stand in blocks, as many as make the cells largest", () => {
  const space = { width: 400, height: 420, left: 26, largest: 74 };
  // One column of 12 layers leaves 420 / 12 = 35 a cell; two of six (400 / 2 - 26) / 3 = 58.
  expect(mapLayout(12, 3, space)).toEqual({ layers: 6, side: 58 });
  expect(mapLayout(6, 3, space)).toEqual({ layers: 6, side: 70 });
  // Twelve heads fill the width by themselves.
  expect(mapLayout(12, 12, space).layers).toBe(12);
  // Numbers: a block takes 26 + 3 * 74 = 248, so 400 hold one and 500 two; eight layers are never divided.
  expect(numberLayout(12, 3, space)).toEqual({ layers: 12, side: 74 });
  expect(numberLayout(12, 3, { ...space, width: 500 })).toEqual({ layers: 6, side: 74 });
  expect(numberLayout(8, 3, { ...space, width: 500 }).layers).toBe(8);
});

test("a flow has the hue of its direction, and fades with its length", () => {
  const of = (x: number, y: number) => directionColour(x, y).map((share) => Number(share.toFixed(2)));
  // Hues 0, 90, 180 and 270 degrees at lightness 0.55 and chroma 0.4 in HSL, clockwise from the right.
  expect(of(2, 0)).toEqual([0.95, 0.15, 0.15]);
  expect(of(0, 1)).toEqual([0.55, 0.95, 0.15]);
  expect(of(-1, 0)).toEqual([0.15, 0.95, 0.95]);
  expect(of(0, -1)).toEqual([0.55, 0.15, 0.95]);
  const xy = Float32Array.from([3, 4, 0, 0, 0, -2.5, NaN, NaN]);
  expect(longest(xy)).toBe(5);
  expect([...flow(xy, 5).alpha]).toEqual([1, 0, 0.5, 0]);
  expect(longest(Float32Array.from([0.1, 0]))).toBe(0.5);
});

test("two overlays of weights get one scale, other kinds and missing ones stay", () => {
  const weights = (floor: number, top: number) => ({
    kind: "weights" as const,
    grid: [1, 1] as [number, number],
    what: "",
    values: new Float32Array([top]),
    floor,
    top,
    floorName: "",
    unit: "",
    prefix: [],
  });
  const [one, two] = inOneScale([weights(0.2, 1), weights(0, 0.5)]);
  expect([one, two].map((paint) => paint?.kind === "weights" && [paint.floor, paint.top])).toEqual([
    [0, 1],
    [0, 1],
  ]);
  const marks = { kind: "marks" as const, grid: [1, 1] as [number, number], what: "", on: new Uint8Array([1]) };
  expect(inOneScale([undefined, marks])).toEqual([undefined, marks]);
});

test("layers of two models stand side by side at the same depth", () => {
  // The middle of L5 of 12 lies at 11/24, between L10 and L11 of 24; that of L6 of 24 at 13/48, in L0 of 3.
  const of = (n: number) => Array.from({ length: n }, (_, layer) => (layer + 0.5) / n);
  const joined = (layer: number, from: number, to: number) => layerAtDepth(of(from)[layer]!, of(to));
  expect([0, 5, 11].map((layer) => joined(layer, 12, 24))).toEqual([1, 11, 23]);
  expect([0, 2, 3].map((layer) => joined(layer, 4, 2))).toEqual([0, 1, 1]);
  expect([joined(6, 24, 3), joined(0, 1, 6), joined(5, 6, 1)]).toEqual([0, 3, 0]);
  // where 12 and 6 layers are compared
  expect(of(6).map((depth) => +positionAt(depth, of(12)).toFixed(6))).toEqual([0.5, 2.5, 4.5, 6.5, 8.5, 10.5]);
  // a model of four blocks whose third has lost its attention: L2 is the fourth
  const pruned = [0.125, 0.375, 0.875];
  expect(of(4).map((depth) => layerAtDepth(depth, pruned))).toEqual([0, 1, 2, 2]);
  expect(pruned.map((depth) => layerAtDepth(depth, of(4)))).toEqual([0, 1, 3]);
  expect(of(4).map((depth) => +positionAt(depth, pruned).toFixed(6))).toEqual([0, 1, 1.5, 2]);
  // A click on a point chooses a layer that is marked there.
  for (const nLayers of [3, 6, 7, 12, 24])
    for (let at = 0; at < Math.min(6, nLayers); at++)
      expect(joined(joined(at, Math.min(6, nLayers), nLayers), nLayers, Math.min(6, nLayers))).toBe(at);
});

test("a photograph is longer than the grid where pixels are left over, and as long where nothing is known", () => {
  const about = { grids: [[4, 4], [4, 5], null], views: [[4.75, 4.5], null, null] } as unknown as Study; // prettier-ignore
  expect([0, 1, 2, -1].map((layer) => beyondGrid(about, layer))).toEqual([[1.1875, 1.125], [1, 1], [1, 1], [1, 1]]); // prettier-ignore
});

test("what lies on the grid of another layer has the margin of that layer's grid", () => {
  const about = { grids: [[25, 25], null, [12, 12]], views: [[25, 25], null, [12.5, 12.5]] } as unknown as Study; // prettier-ignore
  expect(beyondGridOf(about, [25, 25])).toEqual([1, 1]);
  expect(beyondGridOf(about, [12, 12])).toEqual([12.5 / 12, 12.5 / 12]);
  expect(beyondGridOf(about, [6, 6])).toEqual([1, 1]);
});

test("patches of later layers of a hierarchy are longer, and are called by their layer", () => {
  const hierarchy = { grids: [null, [8, 8], [2, 4]] } as unknown as Study;
  expect([1, 2].map((layer) => patchScale(hierarchy, layer))).toEqual([1, Math.sqrt(8)]);
  expect([patchesOf(hierarchy, 2), patchesOf(study, 1)]).toEqual(["patches of L2", "patches"]);
  expect([patchScale(hierarchy, 0), patchScale(study, 1)]).toEqual([1, 1]);
});

test("the wheel of a flow is in patches of the first layer, as all lengths in numbers", async () => {
  const grids = [[2, 2], [1, 1]]; // prettier-ignore
  const tendency = { ...measure("image layer patch xy"), unit: "patches of L0, x to the right, y down" };
  const hierarchy = { ...study, grids, measures: { tendency } } as unknown as Study;
  const values = Float32Array.from([3, 4, 0, 0, 0, 0, 0, 0, 0, 2, NaN, NaN, NaN, NaN, NaN, NaN]);
  const told = { dims: ["layer", "patch", "xy"], shape: [2, 4, 2], values };
  const paint = stored(hierarchy, tendency as Measure, told, 1).paint(1, false);
  expect(paint).toMatchObject({ kind: "arrows", unit: "patches of L1" });
  const wheels = [0, 1].map((layer) => {
    const tints = asFlow(hierarchy, tendency as Measure, stored(hierarchy, tendency as Measure, told, layer), layer);
    return tints.paint(1, false);
  });
  expect(wheels.map((each) => each?.kind === "tints" && each.wheel)).toEqual([
    { length: 5, unit: "patches of L0" },
    { length: 4, unit: "patches of L0" },
  ]);
});

test("lengths of two studies are drawn in one unit: shares of the side where patches are not all alike", () => {
  const length = { ...measure("image layer patch"), unit: "patches" } as unknown as Measure;
  const half = (n: number) => ({ dims: ["layer", "patch"], shape: [1, 1], values: Float32Array.from([n / 2]) });
  const of = (n: number, unit: string | undefined) =>
    inUnitOfComparison({ grids: [null, [n, n]] }, length, half(n), unit);
  const sides = "share of the image's side";
  expect([14, 28].map((n) => of(n, sides).array.values[0])).toEqual([0.5, 0.5]);
  expect(of(14, sides).measure.unit).toBe(sides);
  expect([of(14, "patches").array.values[0], of(14, undefined).array.values[0]]).toEqual([7, 7]);
});

test("an effect is infinite only where every image differs alike, and none where no image does", () => {
  const effect = (standardised: number | null, alike: boolean, mean_difference: number) =>
    effectOf({ standardised, alike, mean_difference } as ComparedMeasure);
  expect(effect(null, true, -0.2)).toBe(-Infinity);
  expect(effect(0, false, 1e-17)).toBe(0);
  expect(effect(null, false, 0.03)).toBeNaN(); // of a single image
  expect(effect(1.5, false, 0.3)).toBe(1.5);
});

test("the sum of windows counts those that hold a patch, in part where they hold a part", () => {
  const row = (left: number, right: number): [number, number, number, number] => [left, 0, right, 0];
  expect([...coverage([row(0, 1), row(0, 0), row(2, 0)], [1, 3])].map((share) => Math.round(share * 3))).toEqual([
    2, 3, 1,
  ]);
  expect([...coverage([row(0, 0.5), undefined], [1, 2])]).toEqual([1, 0.5]);
  expect([...coverage([row(-1, 1), undefined], [1, 2])]).toEqual([0, 1]);
  expect([...coverage([undefined], [1, 1])]).toEqual([0]);
});
