// A chart as a file: SVG with its colours written out, PNG of that, or the numbers as CSV.

const WRITTEN = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "fill-opacity", "stroke-opacity", "font-size", "font-weight", "text-anchor", "stroke-linejoin"];

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
    return await new Promise((done, fail) => canvas.toBlob((blob) => (blob ? done(blob) : fail(new Error("The browser made no PNG."))), "image/png"));
  } finally {
    URL.revokeObjectURL(address);
  }
}

export type Row = Record<string, string | number>;

export function asCsv(rows: Row[]): string {
  const columns = Object.keys(rows[0] ?? {});
  const cell = (value: string | number | undefined) => {
    const text = String(value ?? "");
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns.join(","), ...rows.map((row) => columns.map((column) => cell(row[column])).join(","))].join("\r\n") + "\r\n";
}

export function save(content: Blob | string, name: string, type: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
