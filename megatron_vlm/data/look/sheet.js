"use strict";
// Tells of the token under the pointer, or at the cursor keys; the page is whole without it.
(() => {
  const where = document.getElementById("where");
  let current = null;

  // The tokens of a line are the children of its text, in order; `data-n` counts those of one.
  const count = (token) => Number(token.dataset.n || 1);

  function idsOf(line) {
    const ids = [];
    for (const word of line.dataset.ids.split(" ")) {
      const [id, times] = word.split("*");
      ids.push([id, Number(times || 1)]);
    }
    return ids;
  }

  function idsAt(line, index, tokens) {
    const found = [];
    let at = 0;
    for (const [id, times] of idsOf(line)) {
      if (at + times > index && at < index + tokens) found.push(times > 1 ? `${id} x ${times}` : id);
      at += times;
    }
    return found.join(" ");
  }

  function tell(token) {
    if (current) current.classList.remove("on");
    current = token;
    token.classList.add("on");
    const line = token.closest(".line");
    let index = 0;
    for (const other of token.parentElement.children) {
      if (other === token) break;
      index += count(other);
    }
    const tokens = count(token);
    const range = (first) => tokens > 1 ? `${first}-${first + tokens - 1}` : `${first}`;
    const place = range(Number(line.dataset.first) + index);
    const position = range(Number(line.dataset.position) + index);
    const kind = token.dataset.kind || (token.localName === "b" ? "learned" : "context");
    where.textContent =
      `row ${token.closest(".row").dataset.row} \u00b7 token ${place} of the row \u00b7 ` +
      `position ${position} \u00b7 id ${idsAt(line, index, tokens)} \u00b7 ${kind}`;
  }

  const tokenAt = (node) => {
    const text = node.closest && node.closest(".text");
    if (!text) return null;
    while (node.parentElement !== text) node = node.parentElement;
    return node;
  };

  function step(tokens, forward) {
    const all = [...tokens.querySelectorAll(".text > *")];
    const at = current && tokens.contains(current) ? all.indexOf(current) : forward ? -1 : all.length;
    const next = all[at + (forward ? 1 : -1)];
    if (!next) return;
    const hidden = next.closest("details:not([open])");
    if (hidden && tokens.contains(hidden)) hidden.open = true;
    tell(next);
    next.scrollIntoView({ block: "nearest" });
  }

  document.addEventListener("mouseover", (event) => {
    const token = event.target.closest ? tokenAt(event.target) : null;
    if (token && token !== current) tell(token);
  });

  document.addEventListener("click", (event) => {
    const view = event.target.closest(".view");
    if (view) view.setAttribute("aria-pressed", view.getAttribute("aria-pressed") !== "true");
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const focused = document.activeElement;
    if (event.key === "j" || event.key === "k") {
      const all = [...document.querySelectorAll(".tokens")];
      const at = all.indexOf(focused.closest(".tokens"));
      const next = event.key === "j" ? all[at + 1] : all[Math.max(at - 1, 0)];
      if (next) {
        next.focus({ preventScroll: true });
        next.closest("article").scrollIntoView({ block: "start" });
      }
    } else if (focused.classList.contains("tokens") && /^Arrow(Left|Right)$/.test(event.key)) {
      event.preventDefault();
      step(focused, event.key === "ArrowRight");
    }
  });

  for (const box of document.querySelectorAll(".legend input")) {
    box.addEventListener("change", () => document.body.classList.toggle(box.name, box.checked));
    document.body.classList.toggle(box.name, box.checked);
  }
  where.textContent = "Point at a token, or focus a sample and use the arrow keys.";
})();
