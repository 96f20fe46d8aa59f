import { expect, test, vi } from "vitest";

import { lassoOf, lassoPart, parts, partOf, selected, withPart } from "../src/brush";
import { stepped as coloured } from "../src/colouring";
import { binned, byLayer, headValues, isRight, standing, ordered, statistic, stepped } from "../src/data";
import { copy } from "../src/clipboard";
import { asCsv, formats } from "../src/export";
import { amountColours, colours, extent, inkOn, OTHERS, signedColours } from "../src/palette";
import type { Images, Study, Summary } from "../src/types";

const images: Images = {
  n: 4,
  label: Int32Array.from([0, 1, 0, 2]),
  prediction: Int32Array.from([0, 1, 1, 0]),
  probability: null,
};
const study = {
  class_names: [],
  maps: [{ name: "importance-tsne" }, { name: "importance-pca" }],
} as unknown as Study;
const MAPS: Record<string, number[]> = { tsne: [0, 0, 5, 5, 1, 1, 9, 9], pca: [9, 9, 1, 1, 5, 5, 0, 0] };
vi.stubGlobal("fetch", async (path: string) => {
  const xy = MAPS[path.replace("/api/maps/importance-", "")];
  const headers = { "X-Dims": "image,xy", "X-Shape": "4,2", "X-Dtype": "float32" };
  return new Response(xy && Float32Array.from(xy), { status: xy ? 200 : 404, headers });
});

test("a brush is split into its parts and put together again", () => {
  expect(parts("wrong~label:12")).toEqual([
    { kind: "wrong", rest: "" },
    { kind: "label", rest: "12" },
  ]);
  expect(withPart("wrong~label:12", "label", "3")).toBe("wrong~label:3");
  expect(withPart("wrong~label:12", "right", "")).toBe("label:12~right");
  expect(withPart("wrong~label:12", "wrong", undefined)).toBe("label:12");
  expect(withPart("", "find", "a~b")).toBe("find:a b");
  expect(partOf("find:a:b", "find")?.rest).toBe("a:b");
});

test("all parts of a brush must hold", async () => {
  expect([...(await selected("wrong", images, study)).indices]).toEqual([2, 3]);
  expect([...(await selected("wrong~label:0", images, study)).indices]).toEqual([2]);
  const square = "-1,-1,2,-1,2,2,-1,2";
  expect([...(await selected(`lasso:${square}`, images, study)).indices]).toEqual([0, 2]);
  expect([...(await selected(`lasso:importance-pca,${square}`, images, study)).indices]).toEqual([1, 3]);
  await expect(selected(`lasso:gone,${square}`, images, study)).rejects.toThrow("means nothing in this study");
  await expect(selected("nonsense:1", images, study)).rejects.toThrow("means nothing in this study");
});

test("an outline is kept in the units of the map that it is drawn on", () => {
  const points: [number, number][] = [
    [0.123456, 1],
    [2, 3],
    [4, 5],
  ];
  expect(lassoPart(points, "importance-tsne", study)).toBe("0.1235,1,2,3,4,5");
  const brush = withPart("wrong", "lasso", lassoPart(points, "importance-pca", study));
  expect(brush).toBe("wrong~lasso:importance-pca,0.1235,1,2,3,4,5");
  expect(lassoOf(brush, "importance-pca", study)[1]).toEqual([2, 3]);
  expect(lassoOf(brush, "importance-tsne", study)).toEqual([]);
  expect(lassoOf("", "importance-tsne", study)).toEqual([]);
  const many = Array.from({ length: 600 }, (_, i): [number, number] => [i, i]);
  expect(lassoOf(`lasso:${lassoPart(many, "importance-tsne", study)}`, "importance-tsne", study)).toHaveLength(60);
});

test("steps stay inside the selection and go round", async () => {
  const selection = await selected("label:0", images, study);
  expect(stepped("0", 1, selection)).toBe("2");
  expect(stepped("2", 1, selection)).toBe("0");
  expect(stepped("1", 1, selection)).toBe("2");
  expect(stepped("1", -1, selection)).toBe("0");
});

test("bins count every value once, the greatest in the last", () => {
  const bins = binned([0, 1, 2, 3, 4], 2, Uint8Array.from([1, 0, 0, 0, 1]));
  expect(bins.map(({ all, chosen }) => [all, chosen])).toEqual([
    [2, 1],
    [3, 1],
  ]);
});

test("a statistic is its own part of the values", () => {
  const summary = { values: Float32Array.from({ length: 12 }, (_, at) => at) } as unknown as Summary;
  expect([...statistic(summary, "mean")]).toEqual([0, 1]);
  expect([...statistic(summary, "q95")]).toEqual([10, 11]);
});

test("shades are from the values, and zero is the middle of losses and gains", () => {
  expect(extent([3, NaN, -1])).toEqual([-1, 3]);
  expect(colours([0.2, 0.8], false).domain()).toEqual([0.2, 0.8]);
  expect(colours([2, 2], false).domain()).toEqual([1.5, 2.5]);
  const signed = signedColours(0.5, false);
  expect(signed.domain()).toEqual([-0.5, 0, 0.5]);
  expect(new Set([signed(-0.5), signed(0), signed(0.5), signed(0.02)]).size).toBe(4);
  expect(signed(9)).toBe(signed(0.5));
  expect(amountColours([1, 3], false, true).domain()).toEqual([0, 3]);
  expect(amountColours([1, 3], false, false).domain()).toEqual([1, 3]);
  expect([inkOn("#ffffff"), inkOn("rgb(0, 0, 0)")]).toEqual(["#14161a", "#ffffff"]);
});

test("a table quotes what it must, and no text in it is a formula", () => {
  expect(asCsv([{ name: 'a "b", c', value: -1.5 }])).toBe('name,value\r\n"a ""b"", c",-1.5\r\n');
  for (const text of ["=1+1", "+1", "-1", "@x", "\tx"]) expect(asCsv([{ name: text }])).toBe(`name\r\n'${text}\r\n`);
  expect(asCsv([{ name: '=HYPERLINK("x")' }])).toBe('name\r\n"\'=HYPERLINK(""x"")"\r\n');
  expect(asCsv([{ layer: 0, "vit, small": 0.5, "=x": 1 }])).toBe('layer,"vit, small",\'=x\r\n0,0.5,1\r\n');
});

test("a view without a chart offers no drawing, one without numbers no table", () => {
  expect(formats(2, true)).toEqual(["svg", "png", "csv"]);
  expect(formats(0, true)).toEqual(["csv"]);
  expect(formats(1, false)).toEqual(["svg", "png"]);
});

test("a text is copied where a page has no clipboard, and why not is said", async () => {
  const field = { value: "", select: vi.fn(), remove: vi.fn() };
  const execCommand = vi.fn(() => true);
  const body = { append: vi.fn() };
  vi.stubGlobal("document", { createElement: () => field, execCommand, body, activeElement: null });
  vi.stubGlobal("navigator", {});
  expect([await copy("vitrail open study"), field.value]).toEqual(["", "vitrail open study"]);
  expect([body.append, field.select, field.remove].map((each) => each.mock.calls.length)).toEqual([1, 1, 1]);
  execCommand.mockReturnValue(false);
  expect(await copy("x")).toContain("over http");
  const writeText = vi.fn(async () => {});
  vi.stubGlobal("navigator", { clipboard: { writeText } });
  expect(await copy("x")).toBe("");
  writeText.mockRejectedValue(new Error("not allowed"));
  expect(await copy("x")).toBe("Not copied: not allowed");
  vi.unstubAllGlobals();
});

test("images without a value come last in an order, have a grey of their own and no bin", () => {
  const values = Float32Array.of(3, NaN, 1, 2, 1);
  const images = Int32Array.of(0, 1, 2, 3, 4);
  const value = (image: number) => values[image]!;
  expect([...ordered(images, value, true)]).toEqual([2, 4, 3, 0, 1]);
  expect([...ordered(images, value, false)]).toEqual([0, 3, 2, 4, 1]);
  const { index, palette, legend } = coloured(values, false);
  expect(palette[index[1]!]).toBe(OTHERS);
  expect([...index].filter((step) => step === index[1])).toHaveLength(1);
  expect(legend.at(-1)).toEqual({ colour: OTHERS, words: "no value" });
  expect(coloured(Float32Array.of(1, 2), false).legend).toHaveLength(3);
  const bins = binned(values, 2);
  expect(bins.map(({ low, all }) => [low, all])).toEqual([
    [1, 2],
    [2, 2],
  ]);
});

test("the model is right or wrong of images that have a label of their own", () => {
  const about = { own_labels: true } as Study;
  const facts = { image: "3", label: 1, prediction: 1, probability: 0.3, id: "" };
  expect(isRight(facts, about)).toBe(true);
  expect(isRight({ ...facts, label: 2 }, about)).toBe(false);
  expect(isRight({ ...facts, label: -1 }, about)).toBeUndefined();
  expect(isRight({ ...facts, prediction: undefined }, about)).toBeUndefined();
  expect(isRight(facts, { own_labels: false } as Study)).toBeUndefined();
  expect(isRight({ ...facts, image: "u3f" }, about)).toBeUndefined();
});

test("an image stands among those that have a value", () => {
  const values = Float32Array.from({ length: 40 }, (_, i) => (i < 20 ? i : NaN));
  expect(standing(values, 19)).toEqual({ n: 20, below: 0.95 });
  expect(standing(values, NaN)).toEqual({ n: 20, below: NaN });
  expect(standing(values, undefined).below).toBeNaN();
  expect(standing([NaN, NaN], 1)).toEqual({ n: 0, below: NaN });
  expect(binned([NaN, NaN], 5)).toEqual([]);
  expect(binned([2, NaN, 2], 2).map(({ low, high, all }) => [low, high, all])).toEqual([
    [1.5, 2, 0],
    [2, 2.5, 2],
  ]);
});

test("scores by layer of a selection are the means that the server gives, of as many images", async () => {
  const means = Float32Array.from([0.25, 0.5, ...Array(10).fill(NaN)]);
  const asked: [string, string | undefined][] = [];
  vi.stubGlobal("fetch", async (path: string, init?: RequestInit) => {
    asked.push([path, init?.body as string | undefined]);
    const one = path.startsWith("/api/array");
    const headers = { "X-Dims": one ? "layer" : "statistic,layer", "X-Shape": one ? "2" : "6,2", "X-Dtype": "float32" };
    return new Response(one ? Float32Array.of(1, 2) : means, { headers: { ...headers, "X-Images": "2" } });
  });
  const selection = { key: "wrong", all: false, mask: new Uint8Array(4), indices: Int32Array.of(0, 1, 3) };
  const { values, n } = await byLayer("silhouette", "set", "0", selection);
  expect([...values, n]).toEqual([0.25, 0.5, 2]);
  expect([...(await byLayer("silhouette", "image", "3", selection)).values]).toEqual([1, 2]);
  expect(asked).toEqual([
    ["/api/summary/silhouette", JSON.stringify({ images: [0, 1, 3] })],
    ["/api/array/silhouette?image=3", undefined],
  ]);
});

test("heads that a layer does not have have no value, also where the measure holds zeros", async () => {
  const headers = { "X-Dims": "layer,head", "X-Shape": "2,3", "X-Dtype": "uint8" };
  vi.stubGlobal("fetch", async () => new Response(Uint8Array.of(1, 0, 0, 0, 1, 0), { headers }));
  const about = { n_heads: [1, 3], measures: { head_flip: { baseline: "", unit: "bool", title: "" } } };
  const selection = { key: "", all: true, mask: new Uint8Array(0), indices: new Int32Array(0) };
  const { values } = await headValues("head_flip", "image", "0", selection, about as unknown as Study);
  expect([...values]).toEqual([1, NaN, NaN, 0, 1, 0]);
});
