// The explorer's own server, and nothing else.

const SESSION = document.querySelector('meta[name="session"]').content;

/** An answer of the server that is no success; its message is for people. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Refused(0, "The explorer does not answer; it may have been ended in its terminal.");
  }
  if (!response.ok) {
    const answer = await response.json().catch(() => ({}));
    throw new Refused(response.status, sentence(answer.error || `the explorer answered ${response.status}`));
  }
  return response;
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".");
const post = (path, body, signal) =>
  ask(path, { method: "POST", body, signal, headers: { "x-nnclr-token": SESSION } });

export const about = async () => (await ask("/api/about")).json();
export const mapOf = async (side) => new Float32Array(await (await ask(`/api/map/${side}`)).arrayBuffer());
export const column = async (number) => new Int32Array(await (await ask(`/api/column/${number}`)).arrayBuffer());
export const neighbours = async (row, k) => (await ask(`/api/neighbours/${row}?k=${k}`)).json();
export const matching = async (text) =>
  new Uint32Array(await (await ask(`/api/filter?text=${encodeURIComponent(text)}`)).arrayBuffer());
export const search = async (file, k) => (await post(`/api/search?k=${k}`, file)).json();
export const selection = async (rows, format) => (await post(`/api/selection?format=${format}`, rows)).blob();

const items = new Map();
/** Name of a row; asked for once. */
export function item(row) {
  if (!items.has(row)) {
    items.set(row, ask(`/api/item/${row}`).then((answer) => answer.json()));
    items.get(row).catch(() => items.delete(row));
  }
  return items.get(row);
}

/** Address of a row's picture; the session is in it so that no browser shows an older collection's. */
export const imageOf = (row, size = "thumbnail") => `/${size}/${row}?of=${SESSION.slice(0, 8)}`;
