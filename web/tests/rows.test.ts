import { expect, test } from "vitest";

import { rowsOf } from "../src/overlays/rows";

const base = { grid: [1, 2] as [number, number], what: "attention" };

test("an overlay is a table of its patches, and of the tokens that lie on none", () => {
  const values = Float32Array.from([0.25, 0.5]);
  const scale = { floor: 0, top: 1, floorName: "even", unit: "" };
  const weights = {
    kind: "weights",
    ...base,
    ...scale,
    values,
    prefix: [{ name: "class token", value: 0.25 }],
  } as const;
  expect(rowsOf({ ...weights, prefix: [...weights.prefix] }, 0)).toEqual([
    { row: 0, column: 0, value: 0.25 },
    { row: 0, column: 1, value: 0.5 },
    { row: "class token", column: "", value: 0.25 },
  ]);
  expect(rowsOf({ kind: "marks", ...base, on: Uint8Array.from([0, 1]) }, 0)[1]).toEqual({
    row: 0,
    column: 1,
    value: 1,
  });
  const xy = Float32Array.from([1, 2, 3, 4]);
  const unit = "patches of L3";
  expect(rowsOf({ kind: "arrows", ...base, unit, xy }, 0)[1]).toEqual({ row: 0, column: 1, x: 3, y: 4, unit });
  expect(rowsOf({ kind: "box", ...base, unit, sides: [1, 0, 2, 0] }, 1)).toEqual([
    { row: 0, column: 1, left: 1, top: 0, right: 2, bottom: 0, unit },
  ]);
  expect(rowsOf({ ...weights, unit: "nats", prefix: [...weights.prefix] }, 0).map((row) => row.unit)).toEqual(
    Array(3).fill("nats"),
  );
  const rgb = Float32Array.from([0, 0.5, 1, 1, 0.5, 0]);
  expect(rowsOf({ kind: "tints", ...base, rgb }, 0)[1]).toEqual({ row: 0, column: 1, red: 1, green: 0.5, blue: 0 });
});
