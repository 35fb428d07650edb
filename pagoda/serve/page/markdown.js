// Markdown as language models write it, turned into DOM nodes. What a model writes enters the page as text nodes only,
// and a link only where its address is safe: no answer can become HTML or script. Long runs of a mark, which small
// models like to produce, cost little: every pattern below is bounded, and so is the nesting.

import { el } from "./dom.js";

const DEEPEST = 12;
const FENCE = /^\s*(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^\s*([-*+]|(\d{1,9})[.)])(?:\s+(.*))?$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

/** The nodes of a text, which may end anywhere: an answer is shown while it comes. */
export const markdown = (text) => blocks(text.split(/\r?\n/), 0);

// A block parser takes the lines and where to begin; it returns [node, the line after it] or nothing.
function blocks(lines, depth) {
  const parsers = depth < DEEPEST ? [fence, heading, rule, quote, list, table, paragraph] : [paragraph];
  const nodes = [];
  for (let at = 0; at < lines.length; ) {
    if (isBlank(lines[at])) {
      at++;
      continue;
    }
    for (const parser of parsers) {
      const found = parser(lines, at, depth);
      if (!found) continue;
      nodes.push(found[0]);
      at = found[1];
      break;
    }
  }
  return nodes;
}

const isBlank = (line) => !line.trim();
const isTable = (lines, at) => lines[at].includes("|") && lines[at + 1]?.includes("|") && DIVIDER.test(lines[at + 1]);
const startsBlock = (lines, at) =>
  [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(lines[at])) || isTable(lines, at);

function fence(lines, at) {
  const opening = FENCE.exec(lines[at]);
  if (!opening) return;
  const [, mark, language] = opening;
  const isEnd = (line) => line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "");
  let end = at + 1;
  while (end < lines.length && !isEnd(lines[end])) end++;
  const code = lines.slice(at + 1, end).map((line) => dedent(line, indent(lines[at])));
  const button = el("button", { type: "button", class: "copy-code" }, "Copy");
  const bar = el("figcaption", {}, language.trim().split(/\s/)[0], button);
  return [el("figure", { class: "code" }, bar, el("pre", { tabIndex: 0 }, el("code", {}, code.join("\n")))), end + 1];
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return;
  const level = Math.min(found[1].length + 2, 6); // the page itself has the first two levels
  return [el(`h${level}`, {}, ...inline(found[2].trim().replace(/\s#+$/, ""))), at + 1];
}

const rule = (lines, at) => RULE.test(lines[at]) && [el("hr"), at + 1];

function quote(lines, at, depth) {
  const inner = [];
  while (at < lines.length && QUOTE.test(lines[at])) inner.push(lines[at++].replace(QUOTE, ""));
  return inner.length && [el("blockquote", {}, ...blocks(inner, depth + 1)), at];
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  if (!first) return;
  const isOrdered = Boolean(first[2]);
  const edge = indent(lines[at]);
  const isDeeper = (line) => indent(line) >= edge + 2;
  const node = isOrdered ? el("ol", first[2] === "1" ? {} : { start: Number(first[2]) }) : el("ul");
  for (;;) {
    const next = skipBlank(lines, at);
    const item = next < lines.length && !isDeeper(lines[next]) && !RULE.test(lines[next]) && ITEM.exec(lines[next]);
    if (!item || Boolean(item[2]) !== isOrdered) break;
    at = next + 1;
    const own = [(item[3] ?? "").replace(/^\[ \] /, "☐ ").replace(/^\[[xX]\] /, "☑ ")];
    let inner = edge + item[1].length + 1; // where the item's text begins; models often indent by less
    // An item's lines: what stands deeper, and whatever goes on with its last paragraph.
    while (at < lines.length) {
      const after = skipBlank(lines, at);
      if (after === lines.length) break;
      if (!isDeeper(lines[after]) && (after > at || startsBlock(lines, at))) break;
      if (isDeeper(lines[after])) inner = Math.min(inner, indent(lines[after]));
      own.push(...lines.slice(at, after + 1).map((line) => dedent(line, inner)));
      at = after + 1;
    }
    node.append(el("li", {}, ...blocks(own, depth + 1)));
  }
  return [node, at];
}

function table(lines, at) {
  if (!isTable(lines, at)) return;
  const side = (mark) => (!mark.endsWith(":") ? "left" : mark.startsWith(":") ? "center" : "right");
  const sides = cells(lines[at + 1]).map(side);
  const row = (tag, line) => {
    const texts = cells(line).slice(0, sides.length);
    return el("tr", {}, ...texts.map((text, i) => el(tag, { class: sides[i] }, ...inline(text))));
  };
  const head = el("thead", {}, row("th", lines[at]));
  const body = el("tbody");
  for (at += 2; at < lines.length && lines[at].includes("|"); at++) body.append(row("td", lines[at]));
  return [el("div", { class: "table", tabIndex: 0 }, el("table", {}, head, body)), at];
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, at, depth) {
  const own = [lines[at++].trim()];
  const goesOn = (at) => at < lines.length && !isBlank(lines[at]) && (depth >= DEEPEST || !startsBlock(lines, at));
  while (goesOn(at)) own.push(lines[at++].trim());
  return [el("p", {}, ...inline(own.join("\n"))), at];
}

function skipBlank(lines, at) {
  while (at < lines.length && isBlank(lines[at])) at++;
  return at;
}

const indent = (line) => /^[ \t]*/.exec(line)[0].replaceAll("\t", "    ").length;

/** The line without its first `width` columns, as far as these are white. */
function dedent(line, width) {
  while (width > 0 && /^[ \t]/.test(line)) {
    width -= line[0] === "\t" ? 4 : 1;
    line = line.slice(1);
  }
  return line;
}

// What stands inside a line, one kind after the other. RUN is a character, an escape or a whole span of code.
const RUN = String.raw`\\[^]|\x60[^\x60]{1,300}\x60`;
const KINDS = [
  String.raw`\\(?<escaped>[!-\/:-@\[-\x60{-~])`,
  String.raw`(?<!\x60)(?<ticks>\x60+)(?!\x60)(?<code>[^]{1,2000}?)(?<!\x60)\k<ticks>(?!\x60)`,
  String.raw`!?\[(?<label>(?:[^\[\]\\]|\\[^]|\[[^\[\]]{0,200}\]){0,400})\]` +
    String.raw`\(\s{0,9}<?(?<address>(?:[^\s()<>]|\([^\s()]{0,200}\)){1,2000})>?(?:\s{1,9}"[^"]{0,200}")?\s{0,9}\)`,
  String.raw`<?(?<url>https?:\/\/[^\s<>"\x60|]{0,2000}[^\s<>"\x60|.,;:!?*_~)\]'])>?`,
  String.raw`(?<br><br ?\/?>)`,
  String.raw`(?<!\*)\*\*(?!\s)(?<strong>(?:${RUN}|[^\x60\\]){1,1000}?)(?<!\s)\*\*(?!\*)`,
  String.raw`(?<!\w)__(?!\s)(?<strong_>(?:${RUN}|[^\x60\\]){1,1000}?)(?<!\s)__(?!\w)`,
  String.raw`(?<!\*)\*(?![\s*])(?<em>(?:${RUN}|\*\*[^*]{1,300}\*\*|[^\x60\\*]){1,1000}?)(?<!\s)\*(?!\*)`,
  String.raw`(?<!\w)_(?![\s_])(?<em_>(?:${RUN}|(?<=\w)_(?=\w)|[^\x60\\_]){1,1000}?)(?<!\s)_(?!\w)`,
  String.raw`~~(?!\s)(?<del>(?:${RUN}|[^\x60\\~]){1,1000}?)(?<!\s)~~`,
];
const INLINE = new RegExp(String.raw`(?=[\\\x60!\[<h*_~])(?:${KINDS.join("|")})`, "g"); // a mark, or http, begins it
const SAFE = /^(?:https?:\/\/|mailto:)\S+$/i;

function inline(text, depth = 0) {
  const nodes = [];
  let from = 0;
  for (const match of depth < DEEPEST ? text.matchAll(INLINE) : []) {
    nodes.push(...broken(text.slice(from, match.index)), ...span(match[0], match.groups, depth + 1));
    from = match.index + match[0].length;
  }
  return [...nodes, ...broken(text.slice(from))];
}

function span(source, found, depth) {
  const nested = (tag, text) => [el(tag, {}, ...inline(text, depth))];
  if (found.escaped) return [found.escaped];
  if (found.code) return [el("code", {}, found.code.replace(/^ (.*\S.*) $/s, "$1"))];
  if (found.url) return [link(found.url, [found.url])];
  if (found.br) return [el("br")];
  if (found.del) return nested("del", found.del);
  if (found.strong ?? found.strong_) return nested("strong", found.strong ?? found.strong_);
  if (found.em ?? found.em_) return nested("em", found.em ?? found.em_);
  // Pictures become links too: showing one would ask another host for it.
  return SAFE.test(found.address) ? [link(found.address, inline(found.label || found.address, depth))] : broken(source);
}

function link(href, children) {
  const flat = children.map((child) => (child.tagName === "A" ? child.textContent : child)); // no link in a link
  return el("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...flat);
}

/** Text whose line ends stay line ends. */
function broken(text) {
  const parts = text.split("\n").flatMap((line, i) => (i ? [el("br"), line] : [line]));
  return parts.filter((part) => part !== "");
}
