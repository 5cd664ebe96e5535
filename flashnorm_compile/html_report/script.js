"use strict";
// Draws the graph as a tree of modules. A module's rows become elements when it is opened for the first time.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const STATUS = ["kept", "changed", "added", "removed"];
  const MOST_FOUND = 300;
  const nodes = data.nodes.map((row) => ({
    name: row[0], value: row[1], kind: data.kinds[row[2]], operator: data.operators[row[3]], args: row[4],
    module: data.modules[row[5]], source: data.sources[row[6]], status: STATUS[row[7]],
    part: row[8] < 0 ? "" : data.parts[row[8]], parameter: data.parameters[row[9]], backward: row[10] === 1, was: row[11],
  }));
  const rewritten = (node) => node.status !== "kept";
  const mixed = (node) => node.kind.includes("Mixed(");
  const origin = nodes.find(mixed);
  const firstOf = new Map();  // type -> the first node that has it
  for (const node of nodes) if (!firstOf.has(node.kind)) firstOf.set(node.kind, node);
  let onlyRewritten = false;

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function moduleTree() {
    const root = { path: "", label: "whole graph", nodes: [], children: new Map(), all: [] };
    for (const node of nodes) {
      let place = root;
      root.all.push(node);
      const parts = node.module === "" ? [] : node.module.split(".");
      for (const part of parts) {
        if (!place.children.has(part)) {
          const path = place.path ? place.path + "." + part : part;
          place.children.set(part, { path, label: part, nodes: [], children: new Map(), all: [] });
        }
        place = place.children.get(part);
        place.all.push(node);
      }
      place.nodes.push(node);
    }
    return root;
  }

  // Why samples are mixed is told once, at the node that mixes them.
  const kindText = (node) => mixed(node) && firstOf.get(node.kind) !== node ? node.kind.replace(/: .*/, ")") : node.kind;

  // A source line stands at the first of the rows in a series that come from it.
  function row(node, position, list) {
    const line = element("tr", rewritten(node) ? node.status : "");
    line.append(element("td", "", node.name), element("td", "", node.value));
    const kind = element("td");
    if (node.kind) {
      const plain = mixed(node) ? "Mixed" : node.kind.split("(")[0].split(" ")[0];
      kind.append(element("span", "kind " + plain, kindText(node)));
    } else if (node.part) {
      kind.append(element("span", "mark added", node.part));
    }
    const what = element("td", "", node.operator + " " + node.args);
    if (node.was) what.append(element("span", "was", "before: " + node.was));
    if (node.source && (position === 0 || list[position - 1].source !== node.source)) what.append(element("span", "source", node.source));
    line.append(kind, what);
    return line;
  }

  function rows(title, list) {
    const shown = onlyRewritten ? list.filter(rewritten) : list;
    const group = element("div", "group");
    if (!shown.length) return group;
    group.append(element("h3", "", title + " (" + shown.length + ")"));
    const table = element("table", "rows");
    const body = element("tbody");
    body.append(...shown.map(row));
    table.append(body);
    group.append(table);
    return group;
  }

  function ownRows(place) {
    const own = place.nodes.filter((node) => node.status !== "added" || !node.part);
    const groups = [
      rows("inputs", own.filter((node) => node.operator === "input")),
      rows("forward", own.filter((node) => node.operator !== "input" && !node.backward)),
      rows("backward", own.filter((node) => node.operator !== "input" && node.backward)),
    ];
    for (const part of data.parts) {
      const added = place.nodes.filter((node) => node.status === "added" && node.part === part);
      for (const parameter of new Set(added.map((node) => node.parameter))) {
        const title = "added: " + part + (parameter ? " of " + parameter : "");
        groups.push(rows(title, added.filter((node) => node.parameter === parameter)));
      }
    }
    return groups;
  }

  function summary(label, cls, inside) {
    const head = element("summary", "", label + " ");
    if (cls) head.append(element("span", "class", cls));
    head.append(element("span", "count", inside.length + " nodes"));
    for (const status of ["added", "changed", "removed"]) {
      const count = inside.filter((node) => node.status === status).length;
      if (count) head.append(element("span", "mark " + status, count + " " + status));
    }
    const mixing = inside.filter(mixed).length;
    if (mixing) head.append(element("span", "mark mixed", mixing + " Mixed"));
    return head;
  }

  function draw(place) {
    const box = element("details");
    box.append(summary(place.label, data.classes[place.path], place.all));
    let drawn = false;
    box.addEventListener("toggle", () => {
      if (!box.open || drawn) return;
      drawn = true;
      const children = [...place.children.values()];
      const shown = onlyRewritten ? children.filter((child) => child.all.some(rewritten)) : children;
      box.append(...shown.map(draw));
      if (place === root) box.append(outside());
      else box.append(...ownRows(place));
      // A module with one child and nothing of its own would only cost a click.
      if (shown.length === 1 && !place.nodes.length) box.querySelector("details").open = true;
    });
    box.open = place === root || (origin !== undefined && place.all.includes(origin));
    return box;
  }

  function outside() {
    const box = element("details");
    box.append(summary("inputs, outputs and what is in no single module", "", root.nodes));
    box.addEventListener("toggle", () => {
      if (box.children.length === 1) box.append(...ownRows(root));
    });
    box.open = root.nodes.includes(origin);
    return box;
  }

  const root = moduleTree();
  const tree = document.getElementById("tree");
  function drawTree() {
    tree.replaceChildren(draw(root));
  }

  const found = document.getElementById("found");
  function search(word) {
    found.replaceChildren();
    tree.hidden = word !== "";
    if (!word) return;
    const wanted = word.toLowerCase();
    const text = (node) => [node.name, node.operator, node.kind, node.module, node.source, node.part, node.parameter].join(" ");
    const hits = nodes.filter((node) => text(node).toLowerCase().includes(wanted) && (!onlyRewritten || rewritten(node)));
    if (!hits.length) {
      found.append(element("p", "hint", "No node fits."));
      return;
    }
    const list = hits.slice(0, MOST_FOUND);
    const title = hits.length > MOST_FOUND ? "found " + hits.length + ", the first" : "found";
    const box = element("div", "group");
    box.append(element("h3", "", title + " " + list.length));
    const table = element("table", "rows");
    const body = element("tbody");
    body.append(...list.map(row));
    table.append(body);
    box.append(table);
    found.append(box);
  }

  const field = document.getElementById("search");
  field.addEventListener("input", () => search(field.value.trim()));
  document.getElementById("rewritten").addEventListener("change", (event) => {
    onlyRewritten = event.target.checked;
    drawTree();
    search(field.value.trim());
  });
  drawTree();
})();
