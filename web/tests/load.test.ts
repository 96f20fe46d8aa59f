import { expect, test } from "vitest";

import { Loaded } from "../src/load.svelte";

/** Questions that are answered when the test says so. */
function asking() {
  const loaded = new Loaded<string>();
  const answers: ((value: string) => void)[] = [];
  const refusals: ((failure: Error) => void)[] = [];
  let leave = () => {};
  const ask = () => {
    leave();
    leave = loaded.ask(() => new Promise((answer, refuse) => (answers.push(answer), void refusals.push(refuse))));
  };
  const answer = async (at: number, value: string) => {
    answers[at]!(value);
    await Promise.resolve();
  };
  const refuse = async (at: number, sentence: string) => {
    refusals[at]!(new Error(sentence));
    await Promise.resolve();
  };
  return { loaded, ask, answer, refuse };
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

test("the refusal of one image does not stand beside the next, nor beside a question that is cancelled", async () => {
  const { loaded, ask, answer, refuse } = asking();
  ask();
  await refuse(0, "its file has gone");
  expect(loaded.error).toBe("its file has gone");
  ask();
  expect([loaded.error, loaded.current]).toEqual([undefined, undefined]);
  await answer(1, "the next photograph");
  expect([loaded.error, loaded.current]).toEqual([undefined, "the next photograph"]);
  ask();
  await refuse(2, "its file has gone");
  loaded.stop();
  expect([loaded.error, loaded.stopped]).toEqual([undefined, true]);
});
