// A chart as a file: SVG with its colours written out, PNG of that, or the numbers as CSV.

const WRITTEN = [
  "fill",
  "stroke",
  "stroke-width",
  "stroke-dasharray",
  "opacity",
  "fill-opacity",
  "stroke-opacity",
  "font-size",
  "font-weight",
  "text-anchor",
  "stroke-linejoin",
  "vector-effect",
];

export type Format = "svg" | "png" | "csv";

/** What a view can be saved as: its charts as a drawing, its numbers as a table. Pictures on a canvas are neither. */
export const formats = (nCharts: number, hasRows: boolean): Format[] => [
  ...(nCharts ? (["svg", "png"] as const) : []),
  ...(hasRows ? (["csv"] as const) : []),
];

/** The chart's SVG as a document of its own: what the stylesheet gave is written on every element. */
export function standalone(charts: SVGSVGElement[], title: string): string {
  const sizes = charts.map((chart) => chart.getBoundingClientRect());
  const width = Math.max(...sizes.map((size) => size.width));
  const height = 26 + sizes.reduce((sum, size) => sum + size.height + 6, 0);
  const { backgroundColor: paper, color: ink } = getComputedStyle(charts[0]!.closest(".view")!);
  let top = 26;
  const bodies = charts.map((chart, i) => {
    const copy = chart.cloneNode(true) as SVGSVGElement;
    const originals = [chart, ...chart.querySelectorAll("*")];
    [copy, ...copy.querySelectorAll("*")].forEach((element, at) => written(element, originals[at]!));
    copy.setAttribute("y", String(top));
    copy.setAttribute("width", String(sizes[i]!.width));
    copy.setAttribute("height", String(sizes[i]!.height));
    top += sizes[i]!.height + 6;
    return new XMLSerializer().serializeToString(copy);
  });
  const head = `<rect width="100%" height="100%" fill="${paper}"/><text x="6" y="17" font-size="13" fill="${ink}">${escaped(title)}</text>`;
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" font-family="system-ui, sans-serif">${head}${bodies.join("")}</svg>`;
}

/** Pixels of a picture for each of the screen, in a file. */
const FINE = 2;

/** Pictures, drawings and words of a part of the page where they stand on the screen, as one SVG. */
export function snapshot(parts: Element[], title: string): string {
  const boxes = parts.map((part) => part.getBoundingClientRect());
  const left = Math.min(...boxes.map((box) => box.left));
  const top = Math.min(...boxes.map((box) => box.top)) - 26;
  const width = Math.max(...boxes.map((box) => box.right)) - left;
  const height = Math.max(...boxes.map((box) => box.bottom)) - top;
  const place = ({ x, y, width, height }: DOMRect) =>
    `x="${x - left}" y="${y - top}" width="${width}" height="${height}"`;
  const { color: ink } = getComputedStyle(parts[0]!);
  const { backgroundColor: paper } = getComputedStyle(document.body);
  const pieces = parts.flatMap((part) => [
    ...[...part.querySelectorAll("img, canvas, svg")].map((each) =>
      each instanceof SVGSVGElement
        ? placed(each, left, top)
        : cut(each as HTMLImageElement | HTMLCanvasElement, place),
    ),
    ...textsOf(part).map(({ text, box, size, shade }) => {
      const at = `x="${box.left - left}" y="${box.bottom - top - 0.25 * box.height}"`;
      return `<text ${at} font-size="${size}" fill="${shade}">${escaped(text)}</text>`;
    }),
  ]);
  const head = `<rect width="100%" height="100%" fill="${paper}"/><text x="0" y="17" font-size="13" fill="${ink}">${escaped(title)}</text>`;
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" font-family="system-ui, sans-serif">${head}${pieces.join("")}</svg>`;
}

function placed(drawing: SVGSVGElement, left: number, top: number): string {
  const copy = drawing.cloneNode(true) as SVGSVGElement;
  const originals = [drawing, ...drawing.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((element, at) => written(element, originals[at]!));
  const { x, y, width, height } = drawing.getBoundingClientRect();
  for (const [name, value] of Object.entries({ x: x - left, y: y - top, width, height }))
    copy.setAttribute(name, String(value));
  return new XMLSerializer().serializeToString(copy);
}

/** A picture in its place, cut off where what holds it ends. */
function cut(picture: HTMLImageElement | HTMLCanvasElement, place: (box: DOMRect) => string): string {
  const { width, height } = picture.getBoundingClientRect();
  const image = `<image width="${width}" height="${height}" href="${asPixels(picture)}"/>`;
  return `<svg ${place(picture.parentElement!.getBoundingClientRect())} overflow="hidden">${image}</svg>`;
}

/** A picture as it is seen: its filter, its opacity and its hard or soft pixels are those of the page. */
function asPixels(picture: HTMLImageElement | HTMLCanvasElement): string {
  const { width, height } = picture.getBoundingClientRect();
  const { filter, imageRendering, opacity } = getComputedStyle(picture);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.round(width * FINE), Math.round(height * FINE)];
  const context = canvas.getContext("2d")!;
  context.filter = filter;
  context.globalAlpha = Number(opacity);
  context.imageSmoothingEnabled = imageRendering !== "pixelated";
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL();
}

function textsOf(part: Element) {
  const walker = document.createTreeWalker(part, NodeFilter.SHOW_TEXT);
  const range = document.createRange();
  const texts: { text: string; box: DOMRect; size: string; shade: string }[] = [];
  while (walker.nextNode()) {
    const [node, around] = [walker.currentNode, walker.currentNode.parentElement!];
    range.selectNodeContents(node);
    const { fontSize: size, color: shade } = getComputedStyle(around);
    const box = range.getBoundingClientRect();
    const text = node.textContent!.trim();
    if (text && box.width > 1 && !around.closest("svg, .note")) texts.push({ text, box, size, shade });
  }
  return texts;
}

function written(element: Element, original: Element): void {
  const styles = getComputedStyle(original);
  for (const name of WRITTEN) element.setAttribute(name, styles.getPropertyValue(name));
  for (const name of ["class", "style", "tabindex", "role"]) element.removeAttribute(name);
}

export const escaped = (text: string): string =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");

/** The SVG drawn at twice its size, for screens and slides. */
export async function asPng(svg: string): Promise<Blob> {
  const picture = new Image();
  const address = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  try {
    picture.src = address;
    await picture.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [picture.width * 2, picture.height * 2];
    canvas.getContext("2d")!.drawImage(picture, 0, 0, canvas.width, canvas.height);
    return await new Promise((done, fail) =>
      canvas.toBlob((blob) => (blob ? done(blob) : fail(new Error("The browser made no PNG."))), "image/png"),
    );
  } finally {
    URL.revokeObjectURL(address);
  }
}

export type Row = Record<string, string | number>;

/** A spreadsheet takes text that begins with one of these for a formula. */
const FORMULA = /^[=+\-@\t\r]/;

export function asCsv(rows: Row[]): string {
  const columns = Object.keys(rows[0] ?? {});
  const cell = (value: string | number | undefined) => {
    const text = typeof value === "string" && FORMULA.test(value) ? `'${value}` : String(value ?? "");
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return (
    [columns.map(cell).join(","), ...rows.map((row) => columns.map((column) => cell(row[column])).join(","))].join(
      "\r\n",
    ) + "\r\n"
  );
}

export function save(content: Blob | string, name: string, type: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
