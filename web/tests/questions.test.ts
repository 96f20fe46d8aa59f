import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { Gate, LEAVES_MS, Questions, SETTLED_MS, UNDER_WAY } from "../src/questions";

beforeEach(() => void vi.useFakeTimers());
afterEach(() => void vi.useRealTimers());

interface Sent {
  key: string;
  answer: (value: string) => void;
  signal: AbortSignal;
}

/** Questions to a server that answers when the test says so. */
function server() {
  const questions = new Questions();
  const sent: Sent[] = [];
  const ask = (key: string, leaving = new AbortController()) => {
    const send = (signal: AbortSignal) =>
      new Promise<string>((answer, fail) => {
        signal.addEventListener("abort", () => fail(signal.reason));
        sent.push({ key, answer, signal });
      });
    const answer = questions.ask(key, leaving.signal, send);
    answer.catch(() => undefined);
    return { answer, leave: () => leaving.abort() };
  };
  return { sent, ask, keys: () => sent.map((each) => each.key) };
}

test("several views ask the same question once, and it goes on until the last of them leaves", async () => {
  const { sent, ask } = server();
  const first = ask("a");
  const second = ask("a");
  await vi.advanceTimersByTimeAsync(SETTLED_MS);
  expect(sent.length).toBe(1);
  first.leave();
  await expect(first.answer).rejects.toThrow();
  expect(sent[0]!.signal.aborted).toBe(false);
  sent[0]!.answer("yes");
  expect(await second.answer).toBe("yes");
  const third = ask("a");
  await vi.advanceTimersByTimeAsync(SETTLED_MS);
  expect(sent.length).toBe(2);
  third.leave();
  expect(sent[1]!.signal.aborted).toBe(true);
});

test("a question that is overtaken at once is never sent, nor one that was overtaken before it was asked", async () => {
  const { sent, ask } = server();
  ask("a").leave();
  const left = new AbortController();
  left.abort();
  await expect(ask("b", left).answer).rejects.toThrow();
  await vi.advanceTimersByTimeAsync(10 * SETTLED_MS);
  expect(sent.length).toBe(0);
});

test("few are under way at a time; those that wait go in their order, without those who left", async () => {
  const { sent, ask, keys } = server();
  const asked = ["a", "b", "c", "d", "e", "f"].map((key) => ask(key));
  await vi.advanceTimersByTimeAsync(SETTLED_MS);
  expect(keys()).toEqual(["a", "b", "c"]);
  expect(sent.length).toBe(UNDER_WAY);
  asked[3]!.leave();
  sent[0]!.answer("yes");
  await vi.advanceTimersByTimeAsync(1);
  expect(keys()).toEqual(["a", "b", "c", "e"]);
  expect(await asked[0]!.answer).toBe("yes");
});

test("a question that was dropped under way keeps its place until the server has noticed", async () => {
  const { ask, keys } = server();
  const asked = ["a", "b", "c", "d"].map((key) => ask(key));
  await vi.advanceTimersByTimeAsync(SETTLED_MS);
  asked[1]!.leave();
  await vi.advanceTimersByTimeAsync(LEAVES_MS - 1);
  expect(keys()).toEqual(["a", "b", "c"]);
  await vi.advanceTimersByTimeAsync(1);
  expect(keys()).toEqual(["a", "b", "c", "d"]);
});

test("a refusal reaches everyone who asked, and the question can be asked again", async () => {
  const questions = new Questions();
  const { signal } = new AbortController();
  const refuse = () => Promise.reject(new Error("busy"));
  const asked = [questions.ask("a", signal, refuse), questions.ask("a", signal, refuse)];
  const refused = Promise.all(asked.map((each) => expect(each).rejects.toThrow("busy")));
  await vi.advanceTimersByTimeAsync(SETTLED_MS);
  await refused;
  const again = questions.ask("a", signal, () => Promise.resolve("yes"));
  await vi.advanceTimersByTimeAsync(SETTLED_MS);
  expect(await again).toBe("yes");
});

test("a gate lets few through at a time, in their order, and a failure makes room as an answer does", async () => {
  const gate = new Gate(2);
  const begun: string[] = [];
  const ends = new Map<string, [() => void, (why: Error) => void]>();
  const pass = (key: string) =>
    gate.pass(() => {
      begun.push(key);
      return new Promise<void>((answer, fail) => ends.set(key, [answer, fail]));
    });
  const passed = ["a", "b", "c", "d"].map(pass);
  await vi.advanceTimersByTimeAsync(0);
  expect(begun).toEqual(["a", "b"]);
  ends.get("b")![1](new Error("no"));
  await expect(passed[1]).rejects.toThrow("no");
  expect(begun).toEqual(["a", "b", "c"]);
  ends.get("a")![0]();
  await passed[0];
  await vi.advanceTimersByTimeAsync(0);
  expect(begun).toEqual(["a", "b", "c", "d"]);
  ends.get("c")![0]();
  ends.get("d")![0]();
  await Promise.all([passed[2], passed[3]]);
  const late = pass("e");
  await vi.advanceTimersByTimeAsync(0);
  expect(begun.at(-1)).toBe("e");
  ends.get("e")![0]();
  await late;
});
