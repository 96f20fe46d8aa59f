import { expect, test, vi } from "vitest";

import { bytesOf, Kept } from "../src/kept";

const ask = (bytes: number) => vi.fn(async () => new Uint8Array(bytes));

test("an answer is asked for once while there is room, and those used longest ago go first", async () => {
  const kept = new Kept<Uint8Array>(100);
  const [first, second, third] = [ask(40), ask(40), ask(40)];
  await kept.once("first", first);
  await kept.once("second", second);
  await kept.once("first", first); // used last: the second goes
  await kept.once("third", third);
  expect([first, second, third].map((each) => each.mock.calls.length)).toEqual([1, 1, 1]);
  expect(kept.get("second")).toBeUndefined();
  expect((await kept.get("first"))?.length).toBe(40);
});

test("walking over large answers holds as many as fit, and frees each that goes once", async () => {
  const freed: number[] = [];
  const kept = new Kept<{ bytes: number; at: number }>(
    256,
    ({ bytes }) => bytes,
    ({ at }) => freed.push(at),
  );
  for (let at = 0; at < 60; at++) await kept.once(`head ${at}`, async () => ({ bytes: 39, at }));
  expect(freed).toEqual(Array.from({ length: 54 }, (_, at) => at)); // 6 of 39 fit
  await kept.once("larger than all", async () => ({ bytes: 1000, at: 99 }));
  expect(kept.get("larger than all")).toBeDefined();
  expect(freed).toHaveLength(60);
});

test("an answer on its way is shared and not dropped, a refusal is asked again", async () => {
  const kept = new Kept<Uint8Array>(10);
  let give: (value: Uint8Array) => void = () => {};
  const slow = vi.fn(() => new Promise<Uint8Array>((answer) => (give = answer)));
  const both = [kept.once("slow", slow), kept.once("slow", slow)];
  await kept.once("other", ask(9));
  expect(kept.get("slow")).toBeDefined();
  give(new Uint8Array(9));
  expect(await both[0]).toBe(await both[1]);
  expect(slow).toHaveBeenCalledTimes(1);
  const refused = vi.fn(async (): Promise<Uint8Array> => Promise.reject(new Error("no")));
  await expect(kept.once("refused", refused)).rejects.toThrow("no");
  await expect(kept.once("refused", refused)).rejects.toThrow("no");
  expect(refused).toHaveBeenCalledTimes(2);
});

test("the bytes of an answer are those of its arrays, wherever they are", () => {
  const looked = { arrays: { a: { values: new Float32Array(10), dims: ["x"] } }, error: "" };
  expect(bytesOf(looked)).toBe(42);
  expect(bytesOf([1, null, "ab"])).toBe(20);
});
