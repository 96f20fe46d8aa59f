import { expect, test } from "vitest";

import { headMetrics } from "../src/metrics";
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
