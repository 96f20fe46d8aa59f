import { expect, test } from "vitest";

import {
  areSides,
  changesBody,
  changesText,
  inWords,
  isChanged,
  parseChanges,
  setPatch,
  toggleHead,
  windowAt,
  withSides,
} from "../src/changes";
import type { Study } from "../src/types";

const about = {
  n_heads: [2, 2],
  grids: [
    [2, 3],
    [2, 3],
  ],
  prefixes: [1, 1],
  class_token: true,
} as unknown as Study;
const nothing = parseChanges("", about);

test("a text of changes is read and written back", () => {
  const text = "L0H1~L1H0:3~patches:0-2,5~black~window:L1H1:4:1,0,2,0~window:Lall:all:0,0,0,0".replace("Lall", "L0all");
  const { gone, ...changes } = parseChanges(text, about);
  expect(gone).toEqual([]);
  expect(changes.patches).toEqual([0, 1, 2, 5]);
  expect(changes.windows[1]).toEqual({ layer: 0, head: null, patch: null, sides: [0, 0, 0, 0] });
  expect(changesText(changes)).toBe(text);
  expect(JSON.parse(changesBody("3", changes))).toMatchObject({ image: "3", heads_off: [[0, 1]], modes: [[1, 0, 3]] });
});

test("what a model does not have is left out and named", () => {
  const { gone, ...changes } = parseChanges("L7H0~L0H1:9~patches:1,40~window:L0H0:99:1,1,1,1~nonsense~L0H0", about);
  expect(gone).toEqual(["L7H0", "L0H1:9", "patches:1,40", "window:L0H0:99:1,1,1,1", "nonsense"]);
  expect([changes.heads, changes.patches]).toEqual([[[0, 0]], [1]]);
  expect(parseChanges("patches:3,2-3", about).patches).toEqual([3, 2]);
});

test("heads and patches are switched and switched back", () => {
  const off = toggleHead(toggleHead(nothing, 0, 1), 1, 1);
  expect(changesText(off)).toBe("L0H1~L1H1");
  expect(changesText(toggleHead(off, 0, 1))).toBe("L1H1");
  const painted = setPatch(setPatch(nothing, 4, true), 3, true);
  expect(changesText(painted)).toBe("patches:3-4");
  expect(isChanged(setPatch(setPatch(painted, 4, false), 3, false))).toBe(false);
});

test("each change is said in words and can be taken back alone", () => {
  const named = inWords(parseChanges("L0H1~L1H0:4~patches:2~removed~window:L1H1:4:1,0,2,0", about), about, () => "it");
  expect(named.map(({ words }) => words)).toEqual([
    "1 patch taken out",
    "L1H1 of row 1, column 1 within 1 left, 0 up, 2 right, 0 down",
    "L0H1 off",
    "L1H0 without it",
  ]);
  expect(changesText(named[0]!.without)).toBe("L0H1~L1H0:4~removed~window:L1H1:4:1,0,2,0");
});

test("the window around a patch is the last that is written for it, and gets other sides in its place", () => {
  const changes = parseChanges("window:L1H0:all:1,1,1,1~window:L1H1:4:2,2,2,2~window:L0all:all:0,0,0,0", about);
  expect(windowAt(changes, 1, 0, 5)?.sides).toEqual([1, 1, 1, 1]);
  expect(windowAt(changes, 1, 1, 5)).toBeUndefined();
  expect(windowAt(changes, 0, 1, 2)?.head).toBeNull();
  const moved = withSides(changes, windowAt(changes, 1, 1, 4)!, [0, 1, 0, 1]);
  expect(changesText(moved)).toBe("window:L1H0:all:1,1,1,1~window:L1H1:4:0,1,0,1~window:L0all:all:0,0,0,0");
});

test("sides of a window are whole patches, none of them empty", () => {
  expect(areSides([0, 2, 64, 2])).toBe(true);
  for (const side of [null, undefined, NaN, 2.5, -1]) expect(areSides([2, side, 2, 2])).toBe(false);
  expect(areSides([2, 2, 2])).toBe(false);
});
