import { expect, test } from "vitest";

import { boundsOf, lastStep, spread } from "../src/charts/lines";
import { ofPatch, overPatches, pulls } from "../src/field";
import { Arrivals } from "../src/arrivals";
import { along, frameNames, readFrames } from "../src/frames";
import {
  chosenPatch,
  firstPatch,
  firstToken,
  movedPatch,
  placeOfTokens,
  prefixNames,
  tokenIn,
  tokenOfPatch,
} from "../src/grids";
import { greatest, laidOut, lengths, likeness, objectColour } from "../src/likeness";
import { GROUPS, OTHERS } from "../src/palette";
import { asColours, asSigns } from "../src/pictures";
import { relevanceLines } from "../src/relevance";
import { fromIntact, placeName, stepsAlong } from "../src/steps";
import type { Study } from "../src/types";

/** Two layers: 2 x 2 patches after a class token, then 1 x 2 without. */
const study = {
  class_token: true,
  n_heads: [2, 2],
  grids: [
    [2, 2],
    [1, 2],
  ],
  prefixes: [1, 0],
  measures: {},
} as unknown as Study;

function frame(header: object, bytes: number[]): Uint8Array {
  let text = JSON.stringify(header);
  while ((text.length + 4) % 8) text += " ";
  const block = new Uint8Array(4 + text.length + Math.ceil(bytes.length / 8) * 8);
  new DataView(block.buffer).setUint32(0, text.length, true);
  block.set(new TextEncoder().encode(text), 4);
  block.set(bytes, 4 + text.length);
  return block;
}

test("frames are read one after the other, each array with what lies along it", () => {
  const about = { dims: ["step"], shape: [2], coords: { step: [0.5, 1] }, offset: 0 };
  const first = frame({ left_out: { b: "no." }, arrays: { a: { ...about, dtype: "uint8", bytes: 2 } } }, [7, 9]);
  const second = frame({ error: "stopped.", arrays: {} }, []);
  const content = new Uint8Array([...first, ...second]);
  const looked = readFrames(content.buffer);
  expect([...looked.arrays.a!.values]).toEqual([7, 9]);
  expect(along(looked.arrays.a!, "step")).toEqual([0.5, 1]);
  expect(along(looked.arrays.a!, "layer")).toEqual([]);
  expect([looked.leftOut, looked.error]).toEqual([{ b: "no." }, "stopped."]);
});

test("a patch is counted on the grid of its layer, and of the first layer", () => {
  expect(chosenPatch(study, 0, 0)).toBe(3);
  expect(chosenPatch(study, 0, 2)).toBe(1);
  expect(chosenPatch(study, 1, 9)).toBe(1);
  expect(firstPatch(study, 1, 1)).toBe(1);
  expect(movedPatch(3, [2, 2], [1, 2])).toBe(1);
  expect(movedPatch(2, [2, 2], [4, 4])).toBe(8);
});

test("likeness leaves the patch itself out, on every layer's grid", () => {
  const values = Float32Array.from([1, 0.5, 0.2, -0.1, 0.4, 1, NaN, NaN]);
  const found = likeness({ dims: [], shape: [2, 4], values }, study, 0);
  expect([found.most[0], found.around[0], found.all[0]].map((value) => +value!.toFixed(3))).toEqual([0.5, 0.2, 0.2]);
  expect(found.all[1]).toBe(1);
  expect(greatest(values.subarray(0, 4), 2, 0).map(({ patch }) => patch)).toEqual([1, 2]);
});

test("lengths are of the chosen patch, of all patches, and of the class token where there is one", () => {
  const values = Float32Array.from([9, 1, 2, 3, 4, 5, 7, NaN, NaN, NaN]);
  const { chosen, median, low, high, first } = lengths({ dims: [], shape: [2, 5], values }, study, 3);
  expect([...chosen]).toEqual([4, 7]);
  expect([...median]).toEqual([2.5, 6]);
  expect([low[0], high[0]].map((value) => +value!.toFixed(2))).toEqual([1.15, 3.85]);
  expect([first![0], first![1]]).toEqual([9, NaN]);
});

test("lengths of a layer that puts patches together lie on the next grid, those of merged tokens nowhere", () => {
  const pyramid = { ...study, class_token: false, prefixes: [0, 0] };
  const joined = Float32Array.from([5, 7, NaN, NaN, 3, NaN, NaN, NaN]);
  const { chosen, median } = lengths({ dims: [], shape: [2, 4], values: joined }, pyramid, 3);
  expect([...chosen]).toEqual([7, NaN]);
  expect([...median]).toEqual([6, 3]);
  expect(placeOfTokens(pyramid, 0, joined.subarray(0, 4))).toEqual({ grid: [1, 2], prefix: 0, n: 2 });
  expect(placeOfTokens(pyramid, 0, [1, 2, 3])).toBeUndefined();
});

test("a class token that joins late, alone or among merged tokens, is no patch", () => {
  const late = { ...study, prefixes: [0, 0] };
  const values = Float32Array.from([9, NaN, NaN, NaN, 3, 4, 5, NaN]);
  const { chosen, median, first } = lengths({ dims: [], shape: [2, 4], values }, late, 3);
  expect([...chosen, ...median]).toEqual([NaN, NaN, NaN, NaN]);
  expect([...first!]).toEqual([9, NaN]);
});

test("measures of patches are read at the chosen one, and averaged without padding", () => {
  const values = Float32Array.from([1, 2, 3, 4, 5, 6, NaN, NaN]);
  expect([...ofPatch(values, 2, study, 2)]).toEqual([3, 5]);
  expect([...overPatches(values, 2, study)]).toEqual([2.5, 5.5]);
  const xy = Float32Array.from([0, 0, 3, 4, 0, 0, 0, 0, 0, 0, NaN, NaN, NaN, NaN, NaN, NaN]);
  expect(pulls({ dims: [], shape: [2, 4, 2], values: xy }, study, 1)).toEqual([{ layer: 0, x: 3, y: 4, length: 5 }]);
  const hierarchy = { ...study, grids: [[2, 2], [1, 1]] } as typeof study; // prettier-ignore
  const both = xy.slice().fill(2, 8, 9).fill(0, 9, 10);
  expect(pulls({ dims: [], shape: [2, 4, 2], values: both }, hierarchy, 1)[1], "later layer of a hierarchy").toEqual({
    layer: 1,
    x: 4,
    y: 0,
    length: 4,
  });
});

test("no method of relevance has the colour of another, nor that of random orders", () => {
  const methods = [
    "raw",
    "rollout",
    "gradient",
    "grad_sam",
    "lrp",
    "self_similarity",
    "prototype_similarity",
    "random 1",
  ];
  const lines = relevanceLines({ dims: [], shape: [8, 2], values: new Float32Array(16) }, methods);
  expect(new Set(lines.map(({ colour }) => colour)).size).toBe(8);
});

test("random orders make one band, methods a line each", () => {
  const values = Float32Array.from([1, 0, 1, 0.5, 1, 0.75]);
  const lines = relevanceLines({ dims: [], shape: [3, 2], values }, ["gradient", "random 1", "random 2"]);
  expect(lines.map(({ name }) => name)).toEqual(["random", "gradient"]);
  expect([lines[0]!.y, lines[0]!.low!, lines[0]!.high!].flatMap((each) => Array.from(each))).toEqual([
    1, 0.625, 1, 0.5, 1, 0.75,
  ]);
});

test("labels of lines keep apart and stay inside", () => {
  expect(spread([10, 12, 50], 14, 100)).toEqual([10, 24, 50]);
  expect(spread([95, 99], 14, 100)).toEqual([86, 100]);
  expect(lastStep([1, 2, NaN])).toBe(1);
  expect(boundsOf([{ name: "", y: [NaN, 3], high: [5, NaN] }])).toEqual([3, 5]);
});

test("published views clip at zero, signed ones keep both signs", () => {
  expect([...asColours([1, -1, 0.5])]).toEqual([255, 0, 128, 255]);
  const signs = asSigns([1, 0, 0, -1, 0, 0], [1, 2, 3], [4, 5, 6]);
  expect([...signs]).toEqual([1, 2, 3, 255, 4, 5, 6, 255]);
});

test("places have the study's names or numbers, or count from 0, and curves begin with the intact image", () => {
  const study = { sizes: { hop: 3 }, places: { amount: [0.25, 0.5], rule: ["shift_mass"] } } as unknown as Study;
  expect(stepsAlong(study, "amount")).toEqual([0.25, 0.5]);
  expect(stepsAlong(study, "hop")).toEqual([0, 1, 2]);
  expect(placeName(study, "amount", 1)).toBe("50 %");
  expect(placeName(study, "rule", 0)).toBe("shift mass");
  expect(placeName(study, "hop", 2)).toBe("2");
  expect([...fromIntact(1, [0.5])]).toEqual([1, 0.5]);
});

test("tokens are laid out to fill a square in the layers that have a place for them, with the colour of their object", () => {
  const values = Float32Array.from([NaN, NaN, NaN, NaN, 2, 10, 4, 30]);
  const [only, ...rest] = laidOut({ dims: [], shape: [2, 2, 2], values }, [0, 5]);
  expect(rest).toEqual([]);
  expect(only!.layer).toBe(1);
  expect(only!.dots.map(({ patch, object }) => [patch, object])).toEqual([
    [0, 0],
    [1, 5],
  ]);
  expect(only!.dots.map(({ x, y }) => [Number(x.toFixed(2)), Number(y.toFixed(2))])).toEqual([
    [0.04, 0.04],
    [0.96, 0.96],
  ]);
  expect(only!.classToken).toBeUndefined();
  expect([objectColour(0, [0, 3, 5]), objectColour(5, [0, 3, 5])]).toEqual([OTHERS, GROUPS[1]]);
});

test("the class token has a place of its own on the scale of the patches, in the layers that have one", () => {
  const values = Float32Array.from([0, 0, 2, 2, 0, 0, 2, 2]);
  const classTokens = { dims: [], shape: [2, 2], values: Float32Array.from([NaN, NaN, 4, 1]) };
  const [without, withOne] = laidOut({ dims: [], shape: [2, 2, 2], values }, [0, 5], classTokens);
  const round = ({ x, y }: { x: number; y: number }) => [Number(x.toFixed(2)), Number(y.toFixed(2))];
  expect(without!.classToken).toBeUndefined();
  expect(without!.dots.map(round)).toEqual([
    [0.04, 0.04],
    [0.96, 0.96],
  ]);
  expect(withOne!.dots.map(round)).toEqual([
    [0.04, 0.04],
    [0.5, 0.96],
  ]);
  expect(round(withOne!.classToken!)).toEqual([0.96, 0.5]);
});

test("names of frames come as soon as a frame is whole, however the stream is cut", async () => {
  const about = { dims: ["step"], shape: [2], coords: {}, dtype: "uint8", bytes: 2, offset: 0 };
  const first = frame({ arrays: { a: about, b: { ...about, offset: 8 } } }, [7, 9, 0, 0, 0, 0, 0, 0, 1, 2]);
  const second = frame({ arrays: { c: about } }, [3, 4]);
  const content = [...first, ...second];
  for (const size of [1, 7, first.length, content.length]) {
    const pieces = Array.from({ length: Math.ceil(content.length / size) }, (_, i) =>
      Uint8Array.from(content.slice(i * size, (i + 1) * size)),
    );
    const stream = new ReadableStream<Uint8Array>({
      start(controller) {
        for (const piece of pieces) controller.enqueue(piece);
        controller.close();
      },
    });
    const names: string[][] = [];
    for await (const each of frameNames(stream)) names.push(each);
    expect(names).toEqual([["a", "b"], ["c"]]);
  }
});

test("who waits for an array goes on once it is there, and everybody once nothing further comes", async () => {
  const arrivals = new Arrivals();
  const order: string[] = [];
  const waiting = ["late", "never"].map(async (name) => {
    await arrivals.of(name);
    order.push(name);
  });
  arrivals.put(["early"]);
  await arrivals.of("early");
  expect(order).toEqual([]);
  arrivals.put(["late"]);
  await waiting[0];
  expect(order).toEqual(["late"]);
  arrivals.end();
  await waiting[1];
  expect(order).toEqual(["late", "never"]);
});

test("a patch of the first layer's grid is chosen where it lies on the chosen layer's", () => {
  const swin = { prefixes: [0, 0, 0, 0], grids: [[14, 14], [14, 14], [7, 7], [7, 7]] } as unknown as Study; // prettier-ignore
  const token = tokenOfPatch(swin, 3, 14 * 7 + 2, [14, 14]);
  expect(token).toBe(7 * 3 + 1); // row 7, column 2 lies in row 3, column 1
  expect(firstPatch(swin, 3, token)).toBe(14 * 6 + 2);
  expect(tokenOfPatch(study, 0, 3, [2, 2])).toBe(1 + 3);
});

test("tokens before the patches are named by what a study knows of them", () => {
  expect(prefixNames(study, 2)).toEqual(["class token", "prefix token 1"]); // DeiT's is made for distillation
  expect(prefixNames({ ...study, class_token: false }, 1)).toEqual(["prefix token 1"]);
});

test("a hierarchy begins at its middle patch, and the patch stays where it lies as grids shrink", () => {
  const swin = { prefixes: [0, 0], grids: [[8, 8], [4, 4]] } as unknown as Study; // prettier-ignore
  expect([firstToken(swin, 0), firstToken(swin, 1), firstToken(study, 0)]).toEqual([8 * 4 + 4, 4 * 2 + 2, 0]);
  // Row 5, column 3 of 8 x 8 lies in row 2, column 1 of 4 x 4, whose first patch is row 4, column 2.
  expect(tokenIn(swin, 8 * 5 + 3, 0, 1)).toBe(4 * 2 + 1);
  expect(tokenIn(swin, 4 * 2 + 1, 1, 0)).toBe(8 * 4 + 2);
  expect([tokenIn(swin, 7, 0, 0), tokenIn(study, 0, 0, 1)]).toEqual([7, 0]);
});
