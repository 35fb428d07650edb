// The few helpers that build and change the page. Text enters it as text nodes only: there is no innerHTML anywhere.

export const $ = (id) => document.getElementById(id);

/** An element with properties (`class` and `aria-...`/`data-...` as attributes, `on...` as listeners) and children. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class" || name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

/** One of the drawings at the top of index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** Gives `target` the children `nodes`, touching only what differs: selections and scrolled code outlive a stream. */
export function morph(target, nodes) {
  nodes.forEach((fresh, i) => {
    const old = target.childNodes[i];
    if (!old) target.append(fresh);
    else if (old.isEqualNode(fresh)) return;
    else if (old instanceof Text && fresh instanceof Text && fresh.data.startsWith(old.data))
      old.appendData(fresh.data.slice(old.length));
    else if (old instanceof Element && old.cloneNode().isEqualNode(fresh.cloneNode()))
      morph(old, [...fresh.childNodes]); // the same but for what it holds
    else old.replaceWith(fresh);
  });
  while (target.childNodes.length > nodes.length) target.lastChild.remove();
}

/** Copies `text` and says so on the button; the old way where the page comes neither by https nor from localhost. */
export async function copy(text, button) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    const field = el("textarea", { value: text, class: "unseen" });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

/** Hands the reader an object as a JSON file. */
export function download(name, object) {
  const file = new Blob([JSON.stringify(object, null, 2)], { type: "application/json" });
  const link = el("a", { href: URL.createObjectURL(file), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
