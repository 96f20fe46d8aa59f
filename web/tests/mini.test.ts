import { expect, test } from "vitest";

import { mini, miniKind, ofLayers } from "../src/mini";
import type { Measure, Sentence } from "../src/types";

const sentence = (layer: number | null, head: number | null) =>
  ({ text: "", measure: "loss", layer, head, images: [] }) as unknown as Sentence;
const measure = (...dims: string[]) => ({ dims }) as unknown as Measure;

test("a sentence of a head is drawn among all heads, one of a layer over layers, others not at all", () => {
  expect(miniKind(sentence(1, 0), measure("image", "layer", "head"))).toBe("heads");
  expect(miniKind(sentence(1, null), measure("image", "layer", "head"))).toBe("layers");
  expect(miniKind(sentence(1, 0), measure("image", "layer", "patch"))).toBe("layers");
  expect(miniKind(sentence(null, null), measure("image", "layer", "head"))).toBeUndefined();
  expect(miniKind(sentence(1, null), measure("image"))).toBeUndefined();
  expect(miniKind(sentence(0, 0), undefined)).toBeUndefined();
});

test("heads stand from the greatest, without those that a layer lacks; layers are means", () => {
  const means = [0.1, 0.4, 0.2, NaN];
  expect(mini("heads", means, 2, sentence(1, 0))).toEqual({ kind: "heads", values: [0.4, 0.2, 0.1], here: 1 });
  expect(mini("layers", means, 2, sentence(1, null))).toEqual({ kind: "layers", values: [0.25, 0.2], here: 1 });
  expect(mini("layers", [NaN, NaN], 1, sentence(null, null))).toEqual({ kind: "layers", values: [NaN], here: -1 });
});

test("a sentence that brings the numbers of all layers is drawn from these", () => {
  const told = { ...sentence(2, null), by_layer: [null, 0.1, 0.3] };
  expect(ofLayers(told)).toEqual({ kind: "layers", values: [NaN, 0.1, 0.3], here: 2 });
});
