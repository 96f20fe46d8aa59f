import { expect, test } from "vitest";

import { Loaded } from "../src/load.svelte";

/** Questions that are answered when the test says so. */
function asking() {
  const loaded = new Loaded<string>();
  const answers: ((value: string) => void)[] = [];
  let leave = () => {};
  const ask = () => {
    leave();
    leave = loaded.ask(() => new Promise((answer) => void answers.push(answer)));
  };
  const answer = async (at: number, value: string) => {
    answers[at]!(value);
    await Promise.resolve();
  };
  return { loaded, ask, answer };
}

test("an answer is current until something else is asked", async () => {
  const { loaded, ask, answer } = asking();
  ask();
  expect(loaded.current).toBeUndefined();
  await answer(0, "map of L0H0");
  expect(loaded.current).toBe("map of L0H0");
  ask();
  expect([loaded.current, loaded.value]).toEqual([undefined, "map of L0H0"]);
  await answer(1, "map of L0H1");
  expect(loaded.current).toBe("map of L0H1");
});

test("nothing is left of a question that is cancelled, nor of the one before, and a late answer is not taken", async () => {
  const { loaded, ask, answer } = asking();
  ask();
  await answer(0, "map of L0H0");
  ask();
  loaded.stop();
  expect([loaded.current, loaded.value, loaded.stopped]).toEqual([undefined, undefined, true]);
  await answer(1, "map of L0H1");
  expect([loaded.current, loaded.value]).toEqual([undefined, undefined]);
  ask();
  await answer(2, "map of L0H2");
  expect([loaded.current, loaded.stopped]).toEqual(["map of L0H2", false]);
});

test("an answer that was overtaken is not taken", async () => {
  const { loaded, ask, answer } = asking();
  ask();
  ask();
  await answer(1, "the second photograph");
  await answer(0, "the first photograph");
  expect(loaded.current).toBe("the second photograph");
});
