import { expect, test } from "vitest";

import { targetOf, targetOfImage } from "../src/target";
import type { Sentence, Study } from "../src/types";

const study = {
  measures: {
    probability: { dims: ["image"], unit: "1", is_quantity: true },
    head_probability: { dims: ["image", "layer", "head"], unit: "1", is_quantity: true },
    field_size: { dims: ["image", "layer", "patch"], unit: "1", is_quantity: true },
  },
  analyses: [
    { name: "base", measures: ["probability"], stored: [] },
    { name: "heads", measures: ["head_probability"], stored: [] },
    { name: "patches", measures: ["field_size"], stored: [] },
  ],
} as unknown as Study;
const sentence = (of: Partial<Sentence>): Sentence => ({
  text: "So.",
  measure: "",
  layer: null,
  head: null,
  images: [],
  caption: "",
  by_layer: [],
  by_layer_title: "",
  ...of,
});

test("a sentence on a head leads to that head and its measure, a photograph below it to these in that image", () => {
  const images = [{ image: 7, words: "loses most" }];
  const told = sentence({ measure: "head_probability", layer: 2, head: 0, images });
  const target = { tab: "heads", metric: "head_probability", layer: 2, head: 0 };
  expect(targetOf(told, study)).toEqual(target);
  expect(targetOfImage(told, 7, study)).toEqual({ ...target, scope: "set", cells: "", image: "7" });
});

test("a photograph below a sentence of no head leads to what every head does there", () => {
  const told = sentence({ measure: "head_probability", images: [{ image: 7, words: "10 heads" }] });
  expect(targetOfImage(told, 7, study)).toEqual({
    tab: "heads",
    metric: "head_probability",
    scope: "image",
    cells: "numbers",
    image: "7",
  });
});

test("a sentence on a layer of patches leads to that tab and layer, and leaves the head", () => {
  expect(targetOf(sentence({ measure: "field_size", layer: 3 }), study)).toEqual({
    tab: "patches",
    measure: "field_size",
    layer: 3,
  });
});

test("a sentence that singles nothing out leads nowhere, and one of a measure that is gone neither", () => {
  expect(targetOf(sentence({}), study)).toBeUndefined();
  expect(targetOf(sentence({ measure: "not_stored" }), study)).toBeUndefined();
});
