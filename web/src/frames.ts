// The blocks in which the server sends arrays of one image: a header in words, then the numbers.

import type { NamedArray, Numbers } from "./types";

export const KINDS = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array } as const;

/** An array of one image, with the names or numbers along its dimensions where it has any. */
export interface LookArray extends NamedArray {
  coords: Record<string, unknown>;
}

export interface Looked {
  arrays: Record<string, LookArray>;
  /** Why the model does not have an array, by its name. */
  leftOut: Record<string, string>;
  /** What went wrong after the first arrays had been sent; empty if nothing did. */
  error: string;
}

interface Header {
  error?: string;
  left_out?: Record<string, string>;
  arrays: Record<string, Described>;
}
interface Described {
  dims: string[];
  shape: number[];
  dtype: keyof typeof KINDS;
  coords: Record<string, unknown>;
  offset: number;
  bytes: number;
}

/** Everything in a stream of frames. A frame: the header's length (uint32, little-endian), the header as JSON, filled up
 * so that what follows begins at a multiple of 8 bytes of the frame, then the arrays, each filled up likewise. */
export function readFrames(content: ArrayBuffer): Looked {
  const looked: Looked = { arrays: {}, leftOut: {}, error: "" };
  const view = new DataView(content);
  for (let start = 0; start < content.byteLength;) {
    const body = start + 4 + view.getUint32(start, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(content, start + 4, body - start - 4))) as Header;
    let end = body;
    for (const [name, { dims, shape, dtype, coords, offset, bytes }] of Object.entries(header.arrays)) {
      const kind = KINDS[dtype];
      const values: Numbers = new kind(content.slice(body + offset, body + offset + bytes));
      looked.arrays[name] = { dims, shape, coords, values };
      end = Math.max(end, body + offset + Math.ceil(bytes / 8) * 8);
    }
    Object.assign(looked.leftOut, header.left_out);
    looked.error ||= header.error ?? "";
    start = end;
  }
  return looked;
}

/** The names of the arrays of each frame of a stream, frame by frame as they come. */
export async function* frameNames(stream: ReadableStream<Uint8Array>): AsyncGenerator<string[]> {
  const reader = stream.getReader();
  let content = new Uint8Array(0);
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const longer = new Uint8Array(content.length + value.length);
    longer.set(content);
    longer.set(value, content.length);
    content = longer;
    for (let end = frameEnd(content); end !== undefined && end <= content.length; end = frameEnd(content)) {
      yield Object.keys(readFrames(content.slice(0, end).buffer).arrays);
      content = content.slice(end);
    }
  }
}

/** Where the first frame ends; undefined while its header is not there. */
function frameEnd(content: Uint8Array<ArrayBuffer>): number | undefined {
  if (content.length < 4) return undefined;
  const body = 4 + new DataView(content.buffer).getUint32(0, true);
  if (content.length < body) return undefined;
  const { arrays } = JSON.parse(new TextDecoder().decode(content.subarray(4, body))) as Header;
  return Math.max(body, ...Object.values(arrays).map(({ offset, bytes }) => body + offset + Math.ceil(bytes / 8) * 8));
}

/** Numbers or names along a dimension; nothing where the array came without. */
export const along = <T>(array: LookArray, dimension: string): T[] =>
  (array.coords[dimension] as T[] | undefined) ?? [];
