import { expect, test } from "vitest";

import { decoded, fixed, overHeads, recordedAnswer, statistics, withValues, type Recording } from "../src/recorded";

async function packed(content: BlobPart): Promise<string> {
  const stream = new Blob([content]).stream().pipeThrough(new CompressionStream("deflate-raw"));
  return btoa(String.fromCharCode(...new Uint8Array(await new Response(stream).arrayBuffer())));
}
const headers = (dims: string, shape: string) => ({ "x-dims": dims, "x-shape": shape, "x-dtype": "float32" });
const values = Float32Array.from({ length: 12 }, (_, i) => i); // [image 3, layer 2, head 2]
const from: Recording = {
  study: "mine",
  thumbnails: [],
  answers: {
    "/api/array/cost": { headers: headers("image,layer,head", "3,2,2"), data: await packed(values) },
    "/api/array/some": {
      headers: headers("image,patch", "2,2"),
      data: await packed(values.slice(0, 4)),
      images: [7, 2],
    },
    "/api/study": { headers: {}, data: await packed('{"n_heads":[2,2]}') },
    "/api/live": { headers: {}, data: await packed('{"state":"none"}') },
  },
};
const floats = async (answer: Response) => [...new Float32Array(await answer.arrayBuffer())];

test("an array is sliced as the server slices it", async () => {
  const answer = await recordedAnswer(from, "/api/array/cost?layer=1&head=0");
  expect([answer.headers.get("X-Dims"), answer.headers.get("X-Shape")]).toEqual(["image", "3"]);
  expect(await floats(answer)).toEqual([2, 6, 10]);
  expect(await floats(await recordedAnswer(from, "/api/array/cost?image=2"))).toEqual([8, 9, 10, 11]);
  expect(await (await recordedAnswer(from, "/api/live")).json()).toEqual({ state: "none" });
});

test("what is of some images only is looked up by their number, and the others are refused", async () => {
  expect(await floats(await recordedAnswer(from, "/api/array/some?image=2"))).toEqual([2, 3]);
  for (const path of ["/api/array/some?image=0", "/api/array/some", "/api/array/none", "/photo/1"]) {
    const answer = await recordedAnswer(from, path);
    expect(answer.status).toBe(404);
    expect((await answer.json()).error).toMatch(/vitrail open mine|open the study itself/i);
  }
});

test("a selection has its mean and quantiles, and no interval", async () => {
  const answer = await recordedAnswer(from, "/api/summary/cost?head=1", JSON.stringify({ images: [0, 2] }));
  expect(answer.headers.get("X-Dims")).toBe("statistic,layer");
  const [mean, low, median] = [0, 1, 4];
  const told = await floats(answer);
  expect(told.slice(2 * mean, 2 * mean + 2)).toEqual([5, 7]);
  expect(told.slice(2 * low, 2 * low + 2)).toEqual([NaN, NaN]);
  expect(told.slice(2 * median, 2 * median + 2)).toEqual([5, 7]);
  const over = await recordedAnswer(from, "/api/summary/cost?over=head", JSON.stringify({ images: [1] }));
  expect((await floats(over)).slice(0, 2)).toEqual([4.5, 6.5]);
});

test("quantiles are between the values, heads that a layer lacks are not counted", () => {
  const told = new Float32Array(statistics([0, 1, 2, 3, 10].map((value) => Float32Array.of(value, NaN))).buffer);
  expect([told[0], told[6], told[8], told[10]]).toEqual([3.2, 0.2, 2, 8.6].map((value) => Math.fround(value)));
  expect(told[1]).toBeNaN();
  expect([...overHeads(Float32Array.of(1, 3, 5, NaN), 2)]).toEqual([2, 5]);
  expect(fixed({ dims: ["a"], shape: [2], bytes: Uint8Array.of(7, 9), itemSize: 1 }, { a: "1" }).bytes[0]).toBe(9);
});

test("attention of one byte is within 2 % of what it was", () => {
  const floor = 1 / (16 * 65);
  const [none, most, half] = [...new Float32Array(decoded(Uint8Array.of(0, 255, 128), floor).buffer)];
  expect([none, most]).toEqual([0, 1]);
  expect(half).toBeCloseTo(Math.exp(Math.log(floor) * (1 - 128 / 255)), 6);
  expect(floor ** (-0.5 / 255)).toBeLessThan(1.02);
});

test("images that lack a layer's values are left out, and each number is of what is there", () => {
  const rows = [
    [1, 2, 3, NaN],
    [NaN, NaN, NaN, NaN],
    [5, NaN, 7, NaN],
    [6, 6, NaN, NaN],
  ].map((row) => Float32Array.from(row));
  const counted = withValues(rows, 2);
  expect(counted).toEqual([rows[0], rows[2]]);
  expect([...new Float32Array(statistics(counted).buffer).subarray(0, 4)]).toEqual([3, 2, 5, NaN]);
  expect(withValues([rows[1]!], 2)).toEqual([rows[1]]);
  expect(withValues([Float32Array.of(1, NaN), Float32Array.of(NaN, 1), Float32Array.of(NaN, NaN)], 2)).toHaveLength(2);
});

test("a selection counts the images that its mean is of", async () => {
  const some = Float32Array.from([1, 2, NaN, NaN, 5, 6]);
  const auroc = { headers: headers("image,layer", "3,2"), data: await packed(some) };
  const answers = { ...from.answers, "/api/array/auroc": auroc };
  const body = JSON.stringify({ images: [0, 1, 2] });
  const answer = await recordedAnswer({ ...from, answers }, "/api/summary/auroc", body);
  expect((await floats(answer)).slice(0, 2)).toEqual([3, 4]);
  expect(answer.headers.get("X-Images")).toBe("2");
});

test("heads that a layer does not have are no zeros in the mean of a selection", async () => {
  const flips = { "x-dims": "image,layer,head", "x-shape": "2,2,3", "x-dtype": "uint8" };
  const answers = {
    "/api/study": { headers: {}, data: await packed('{"n_heads":[1,3]}') },
    "/api/array/flip": { headers: flips, data: await packed(Uint8Array.of(1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 1, 1)) },
  };
  const body = JSON.stringify({ images: [0, 1] });
  const mean = async (query: string, n: number) =>
    (await floats(await recordedAnswer({ ...from, answers }, `/api/summary/flip${query}`, body))).slice(0, n);
  expect(await mean("", 6)).toEqual([0.5, NaN, NaN, 1, 0.5, 1]);
  const [first, second] = await mean("?over=head", 2);
  expect(first).toBe(0.5);
  expect(second).toBeCloseTo(5 / 6, 6);
  expect(await mean("?layer=0", 3)).toEqual([0.5, NaN, NaN]);
});

test("the mean of a selection is corrected by its images with exact values, as the server corrects it", async () => {
  const n = 60;
  const estimates = Float32Array.from({ length: n }, (_, i) => i % 7);
  const exact = estimates.map((value, i) => (i % 2 ? 2 * value + 1 : NaN));
  const answers = {
    ...from.answers,
    "/api/array/drop": { headers: headers("image,layer,head", `${n},1,1`), data: await packed(estimates) },
    "/api/array/drop_exact": { headers: headers("image,layer,head", `${n},1,1`), data: await packed(exact) },
  };
  const asked = async (images: number[]) =>
    recordedAnswer({ ...from, answers }, "/api/summary/drop", JSON.stringify({ images }));
  const every = Array.from({ length: n }, (_, i) => i);
  const answer = await asked(every);
  const average = estimates.reduce((sum, value) => sum + value, 0) / n;
  const [mean, low, , , median] = await floats(answer);
  expect(mean).toBeCloseTo(2 * average + 1, 5); // the exact values lie on a line over the estimates
  expect([low, median]).toEqual([NaN, 7]);
  expect(answer.headers.get("X-Quantiles-Of")).toBe("30");
  expect(answer.headers.get("X-Interval")).toContain("corrected by 30 exact images");
  const few = await asked(every.slice(0, 14));
  expect((await floats(few))[0]).toBeCloseTo(3, 5);
  expect(few.headers.get("X-Interval")).toContain("25 are needed");
});
