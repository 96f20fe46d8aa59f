import { expect, test, vi } from "vitest";

import { pressed } from "../src/keys";
import { headMetrics } from "../src/metrics";
import { shared } from "../src/state.svelte";
import type { Measure, Study } from "../src/types";

const measure = (dims: string[], unit = "", is_quantity = true): Measure => ({
  dims,
  unit,
  title: "",
  low: "",
  high: "",
  source: "",
  limits: "",
  baseline: "",
  is_quantity,
  analysis: "",
});

test("the list of metrics holds only what has a mean over images", () => {
  const perHead = ["image", "layer", "head"];
  const about = {
    measures: {
      head_probability: measure(perHead, "probability"),
      head_probability_exact: measure(perHead, "probability"),
      head_prediction: measure(perHead, "class", false),
      head_flip: measure(perHead, "bool"),
      pattern_map_cluster: measure(perHead, "number from 0, -1 for none", false),
      attention_strength: measure([...perHead, "hop"], "weight"),
    },
  } as unknown as Study;
  expect(headMetrics(about)).toEqual(["head_probability", "head_flip"]);
});

test("an arrow moves the slider that it is pressed in, and the head anywhere else", () => {
  vi.stubGlobal("document", { querySelector: () => null });
  const write = vi.spyOn(shared, "write").mockImplementation(() => {});
  const moves = { study: { n_heads: [3, 3] } as Study, image: String, search: () => {}, help: () => {} };
  const press = (key: string, type: string) => {
    const matches = (selector: string) => selector === `input[type=${type}]`;
    return pressed({ key, target: { matches } } as unknown as KeyboardEvent, moves);
  };
  expect([press("ArrowRight", "range"), press("ArrowUp", "range")]).toEqual([false, false]);
  expect(write).not.toHaveBeenCalled();
  expect([press("ArrowRight", "checkbox"), press("s", "range")]).toEqual([true, true]);
  expect(write.mock.calls.map(([change]) => change)).toEqual([{ head: 1 }, { scope: "image" }]);
  vi.unstubAllGlobals();
});
