// The clipboard. A page that came over plain http from another machine has none, and the browser's old command instead.

/** Copies a text; answers why it was not, empty if it was. */
export async function copy(text: string): Promise<string> {
  if (!navigator.clipboard) return copyByCommand(text) ? "" : "This browser copies nothing from a page over http";
  try {
    await navigator.clipboard.writeText(text);
    return "";
  } catch (failure) {
    return `Not copied: ${failure instanceof Error ? failure.message : failure}`;
  }
}

function copyByCommand(text: string): boolean {
  const field = document.createElement("textarea");
  const before = document.activeElement;
  field.value = text;
  document.body.append(field);
  field.select();
  try {
    return document.execCommand("copy");
  } finally {
    field.remove();
    (before as HTMLElement | null)?.focus();
  }
}
