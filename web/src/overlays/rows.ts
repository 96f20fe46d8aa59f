// The numbers of an overlay as a table: a row a patch, and the tokens that lie on none.

import type { Row } from "../export";
import type { Paint } from "./paint";

export function rowsOf(paint: Paint, patch: number): Row[] {
  const [rows, columns] = paint.grid;
  const place = (at: number) => ({ row: Math.floor(at / columns), column: at % columns });
  const unit: Row = "unit" in paint && paint.unit ? { unit: paint.unit } : {};
  if (paint.kind === "box") {
    const [left, top, right, bottom] = paint.sides;
    return [{ ...place(patch), left, top, right, bottom, ...unit }];
  }
  const cells = Array.from({ length: rows * columns }, (_, at) => {
    if (paint.kind === "weights") return { ...place(at), value: paint.values[at]!, ...unit };
    if (paint.kind === "marks") return { ...place(at), value: paint.on[at]! };
    if (paint.kind === "arrows") return { ...place(at), x: paint.xy[2 * at]!, y: paint.xy[2 * at + 1]!, ...unit };
    const [red, green, blue] = paint.rgb.subarray(3 * at, 3 * at + 3) as unknown as [number, number, number];
    return { ...place(at), red, green, blue };
  });
  const others = paint.kind === "weights" ? paint.prefix : [];
  return [...cells, ...others.map(({ name, value }) => ({ row: name, column: "", value, ...unit }))];
}
