// The page as one file: a study's answers that were recorded into it, where there is no server to ask.
// Arrays are recorded whole and sliced here; what was not recorded is refused in a sentence.

import { STATISTICS } from "./types";

interface Recorded {
  headers: Record<string, string>;
  /** Raw deflate, in base64. */
  data: string;
  /** Of arrays that were recorded of some images only: which, in the order of the array. */
  images?: number[];
}

export interface Recording {
  study: string;
  /** JPEG files in base64, by image. */
  thumbnails: string[];
  answers: Record<string, Recorded>;
}

const PLACE = "vitrail-recording";

/** The recording in this file; undefined where a server stands behind the page. */
export const recording: Recording | undefined = (() => {
  const text = typeof document === "undefined" ? null : document.getElementById(PLACE)?.textContent;
  return text ? (JSON.parse(text) as Recording) : undefined;
})();

/** What the server would have answered. */
export async function recordedAnswer(from: Recording, path: string, body?: unknown): Promise<Response> {
  const exact = from.answers[path];
  if (exact && !exact.images && body === undefined)
    return exact.headers["x-floor"] === undefined
      ? new Response(await unpack(exact), { headers: exact.headers })
      : sliced(await array(exact), {}, exact.headers);
  const { pathname, searchParams } = new URL(path, "http://export");
  const chosen = Object.fromEntries(searchParams);
  if (pathname.startsWith("/api/summary/")) {
    const way = ["over", "cost"].flatMap((key) => (chosen[key] ? [`${key}=${chosen[key]}`] : []));
    const whole = from.answers[pathname + (way.length ? `?${way.join("&")}` : "")];
    if (whole && body === undefined) return sliced(await array(whole), chosen, whole.headers);
    const values = from.answers[pathname.replace("summary", "array")];
    if (values && body !== undefined) return summary(from, pathname, values, chosen, body);
  }
  const whole = from.answers[pathname];
  if (whole && body === undefined) return ofImage(from, whole, chosen);
  return refusal(`This file does not hold that. Open the study itself: vitrail open ${from.study}`);
}

function refusal(sentence: string): Response {
  return new Response(JSON.stringify({ error: sentence }), { status: 404 });
}

async function ofImage(from: Recording, whole: Recorded, chosen: Record<string, string>): Promise<Response> {
  if (whole.images && chosen.image !== undefined) {
    const at = whole.images.indexOf(Number(chosen.image));
    if (at < 0)
      return refusal(
        `This file holds that of ${whole.images.length} images only, among them image ${whole.images[0]}. For the ` +
          `others open the study itself: vitrail open ${from.study}`,
      );
    return sliced(await array(whole), { ...chosen, image: String(at) }, whole.headers);
  }
  if (whole.images) return refusal(`This file holds that of single images only. Choose one, or open the study itself.`);
  return sliced(await array(whole), chosen, whole.headers);
}

async function unpack({ data }: Recorded): Promise<ArrayBuffer> {
  const packed = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Response(stream).arrayBuffer();
}

export interface RawArray {
  dims: string[];
  shape: number[];
  bytes: Uint8Array;
  itemSize: number;
}

const unpacked = new WeakMap<Recorded, Promise<RawArray>>();

function array(recorded: Recorded): Promise<RawArray> {
  const known = unpacked.get(recorded);
  if (known) return known;
  const list = (name: string) => (recorded.headers[name] ?? "").split(",").filter(Boolean);
  const made = unpack(recorded).then((buffer): RawArray => {
    const coded = recorded.headers["x-floor"] !== undefined;
    const bytes = coded ? decoded(new Uint8Array(buffer), Number(recorded.headers["x-floor"])) : new Uint8Array(buffer);
    const itemSize = recorded.headers["x-dtype"] === "uint8" ? 1 : 4;
    return { dims: list("x-dims"), shape: list("x-shape").map(Number), bytes, itemSize };
  });
  unpacked.set(recorded, made);
  return made;
}

/** Attention weights of one byte each, evenly spaced by their logarithm from `floor` to 1; 0 is anything below. */
export function decoded(codes: Uint8Array, floor: number): Uint8Array {
  const table = Float32Array.from({ length: 256 }, (_, code) => (code ? floor ** (1 - code / 255) : 0));
  return new Uint8Array(Float32Array.from(codes, (code) => table[code]!).buffer);
}

/** An array with some dimensions fixed, in C order. */
export function fixed({ dims, shape, bytes, itemSize }: RawArray, chosen: Record<string, string>): RawArray {
  let [rest, left, size] = [bytes, [...dims], [...shape]];
  for (const dim of dims) {
    const index = chosen[dim];
    if (index === undefined) continue;
    const axis = left.indexOf(dim);
    const inner = size.slice(axis + 1).reduce((product, n) => product * n, itemSize);
    const outer = size.slice(0, axis).reduce((product, n) => product * n, 1);
    const next = new Uint8Array(outer * inner);
    for (let i = 0; i < outer; i++) {
      const start = (i * size[axis]! + Number(index)) * inner;
      next.set(rest.subarray(start, start + inner), i * inner);
    }
    rest = next;
    left.splice(axis, 1);
    size.splice(axis, 1);
  }
  return { dims: left, shape: size, bytes: rest, itemSize };
}

function answer({ dims, shape, bytes }: RawArray, headers: Record<string, string>): Response {
  const { buffer, byteOffset, byteLength } = bytes;
  const body = buffer.slice(byteOffset, byteOffset + byteLength) as ArrayBuffer;
  return new Response(body, { headers: { ...headers, "x-dims": dims.join(), "x-shape": shape.join() } });
}

const sliced = (whole: RawArray, chosen: Record<string, string>, headers: Record<string, string>): Response =>
  answer(fixed(whole, chosen), headers);

/** Mean and quantiles of a set of images. Its interval needs resampling, which is not done here. */
async function summary(
  from: Recording,
  pathname: string,
  recorded: Recorded,
  chosen: Record<string, string>,
  body: unknown,
): Promise<Response> {
  if (recorded.images)
    return refusal("This file holds that of single images only. Open the study itself for selections.");
  const { images } = JSON.parse(String(body)) as { images: number[] };
  const whole = await array(recorded);
  const baseline = chosen.cost ? from.answers[`${pathname.replace("summary", "array")}?baseline`] : undefined;
  const plain = baseline && (await array(baseline));
  const one = fixed(whole, { ...chosen, image: String(images[0] ?? 0) });
  const { n_heads } = await new Response(await unpack(from.answers["/api/study"]!)).json();
  const isThere = headsThere(one, chosen, n_heads);
  const overLast = chosen.over === "head" && one.dims.length > 0 && one.dims.at(-1) === "head";
  if (chosen.over && !overLast) return refusal("This file holds no mean over heads of that. Open the study itself.");
  const [dims, shape] = overLast ? [one.dims.slice(0, -1), one.shape.slice(0, -1)] : [one.dims, one.shape];
  const rowsOf = (values: RawArray) =>
    images.map((image) => {
      const stored = numbers(fixed(values, { ...chosen, image: String(image) }), recorded.headers["x-dtype"]);
      let row = stored.map((value, cell) => (isThere(cell) ? value : NaN));
      if (plain) {
        const [base] = numbers(fixed(plain, { image: String(image) }), "float32");
        row = row.map((value) => base! - value);
      }
      return overLast ? overHeads(row, one.shape.at(-1)!) : row;
    });
  const rows = rowsOf(whole);
  const counted = withValues(rows, shape[0] ?? 1);
  const exact = from.answers[`${pathname.replace("summary", "array")}_exact`];
  const corrected = exact && correctedStatistics(rows, rowsOf(await array(exact)));
  const values = corrected?.values ?? statistics(counted);
  const headers = { ...recorded.headers, "x-dtype": "float32", "x-images": String(counted.length) };
  return answer(
    { dims: ["statistic", ...dims], shape: [STATISTICS.length, ...shape], bytes: values, itemSize: 4 },
    {
      ...headers,
      "x-quantiles-of": String(corrected?.values ? corrected.n : counted.length),
      "x-interval": `none of a selection in a file without server${corrected ? `; ${corrected.words}` : ""}`,
    },
  );
}

/** With fewer exact images an estimate is not corrected: as `vitrail.heads.correction`. */
const FEWEST_EXACT = 25;
const NO_SPREAD = 1e-12;

/** Statistics of estimates with the mean corrected by images that have exact values too, NaN on the others, by the
 * regression estimator of `vitrail.heads.correction`; quantiles are of the exact values. */
export function correctedStatistics(estimates: Float32Array[], exact: Float32Array[]) {
  const sample = exact.flatMap((row, i) => (row.some((value) => !Number.isNaN(value)) ? [i] : []));
  const n = sample.length;
  if (n < FEWEST_EXACT)
    return { n, words: `not corrected: ${n} of these images are exact, and ${FEWEST_EXACT} are needed` };
  const every = [...estimates.keys()];
  const values = statistics(sample.map((i) => exact[i]!));
  const mean = new Float32Array(values.buffer, 0, estimates[0]!.length);
  for (let cell = 0; cell < mean.length; cell++) {
    const average = (rows: number[], value: (i: number) => number) =>
      rows.reduce((sum, i) => sum + value(i), 0) / rows.length;
    const [x, y] = [(i: number) => estimates[i]![cell]!, (i: number) => exact[i]![cell]!];
    const all = average(every, x);
    const [middle, height] = [average(sample, x), average(sample, y)];
    const spread = average(sample, (i) => (x(i) - middle) ** 2);
    const varies = spread > NO_SPREAD * average(sample, (i) => (x(i) - all) ** 2);
    const slope = varies ? average(sample, (i) => (x(i) - middle) * (y(i) - height)) / spread : 0;
    mean[cell] = height - slope * (middle - all);
  }
  return { n, values, words: `corrected by ${n} exact images` };
}

function numbers({ bytes }: RawArray, dtype: string | undefined): Float32Array {
  if (dtype === "uint8") return Float32Array.from(bytes);
  const copy = bytes.slice().buffer;
  return dtype === "int32" ? Float32Array.from(new Int32Array(copy)) : new Float32Array(copy);
}

/** Tells the cells of heads that their layer has; counts and flags hold 0 for the others. */
function headsThere({ dims, shape }: RawArray, chosen: Record<string, string>, nHeads: number[]) {
  const index = (dim: string) => {
    const axis = dims.indexOf(dim);
    const stride = shape.slice(axis + 1).reduce((product, n) => product * n, 1);
    return axis < 0 ? () => Number(chosen[dim]) : (cell: number) => Math.floor(cell / stride) % shape[axis]!;
  };
  const [layer, head] = [index("layer"), index("head")];
  return (cell: number) => !(head(cell) >= nHeads[layer(cell)]!); // an array without heads has all of its cells
}

/** The mean over the heads that a layer has. */
export function overHeads(row: Float32Array, n: number): Float32Array {
  return Float32Array.from({ length: row.length / n }, (_, layer) => {
    const present = Array.from(row.subarray(layer * n, (layer + 1) * n)).filter((value) => !Number.isNaN(value));
    return present.reduce((sum, value) => sum + value, 0) / present.length;
  });
}

/** The images that have a value in every layer that has any, as the server counts them: means compare between layers.
 * A row is an image, its first dimension the layers. */
export function withValues(rows: Float32Array[], nLayers: number): Float32Array[] {
  const isIn = (row: Float32Array, layer: number) => {
    const size = row.length / nLayers;
    return row.subarray(layer * size, (layer + 1) * size).some((value) => !Number.isNaN(value));
  };
  const layers = Array.from({ length: nLayers }, (_, layer) => layer);
  const measured = layers.filter((layer) => rows.some((row) => isIn(row, layer)));
  if (!measured.length) return rows;
  const complete = rows.filter((row) => measured.every((layer) => isIn(row, layer)));
  return complete.length ? complete : rows.filter((row) => measured.some((layer) => isIn(row, layer)));
}

/** Mean, no interval, and the 5, 50 and 95 % quantiles of what each column has. */
export function statistics(rows: Float32Array[]): Uint8Array {
  const size = rows[0]?.length ?? 0;
  const values = new Float32Array(STATISTICS.length * size).fill(NaN);
  for (let cell = 0; cell < size; cell++) {
    const column = Float64Array.from(rows, (row) => row[cell]!).filter((value) => !Number.isNaN(value));
    if (!column.length) continue;
    const sum = column.reduce((total, value) => total + value, 0);
    const sorted = column.sort();
    const quantile = (share: number) => {
      const at = share * (sorted.length - 1);
      const [low, high] = [sorted[Math.floor(at)]!, sorted[Math.ceil(at)]!];
      return low + (high - low) * (at - Math.floor(at));
    };
    values[cell] = sum / column.length;
    [0.05, 0.5, 0.95].forEach((share, i) => (values[(3 + i) * size + cell] = quantile(share)));
  }
  return new Uint8Array(values.buffer);
}
