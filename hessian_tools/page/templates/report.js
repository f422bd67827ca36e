// What makes the report answer: sorting, filters, reading values off, comparing blocks.
// Every part looks for its own elements, so that a page without them needs nothing here.
(() => {
  "use strict";

  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  const SVG = "http://www.w3.org/2000/svg";

  function made(tag, text = "", attributes = {}) {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }

  // A name of dotted parts that may be broken between them.
  const breakable = (name) => name.replaceAll(".", ".\u200b");

  // The same rule as hessian_tools/page/words.py: three digits, steps and other whole numbers in full.
  function shown(value) {
    if (!Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    const [digits, power] = value.toExponential(2).split("e");
    let told = `${Number(digits)}e${Number(power)}`;
    if (value === 0 || (size >= 1e-4 && size < 1e5)) {
      const rounded = Number.isInteger(value) ? value : Number(value.toPrecision(3));
      told = rounded.toLocaleString("en", { maximumFractionDigits: 8 });
    }
    return told.replaceAll("-", "−");
  }

  // ------------------------------------------------------------------- tables
  // A row is a tbody of its own, with what it unfolds to below it.

  function valueOf(row, column) {
    const text = row.cells[column].dataset.value;
    if (text === undefined) return null;
    const number = Number(text);
    return text !== "" && !Number.isNaN(number) ? number : text;
  }

  function compared(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a.localeCompare(b, "en", { numeric: true });
  }

  function sortable(table) {
    const heads = all(":scope > thead th", table);
    heads.forEach((head, column) => {
      const button = one("button.sort", head);
      if (!button) return;
      button.addEventListener("click", () => {
        const goesUp = head.getAttribute("aria-sort") !== "ascending";
        const known = [];
        const unknown = []; // which stay last in both directions
        for (const body of table.tBodies) {
          const value = valueOf(body.rows[0], column);
          const isNothing = value === null || value === "nan";
          (isNothing ? unknown : known).push([value, body]);
        }
        known.sort(([a], [b]) => (goesUp ? compared(a, b) : compared(b, a)));
        table.append(...[...known, ...unknown].map(([, body]) => body));
        for (const other of heads) {
          if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
        }
        head.setAttribute("aria-sort", goesUp ? "ascending" : "descending");
      });
    });
  }

  function filterable(frame) {
    const input = one("input[type=search]", frame);
    if (!input) return;
    const chips = all("button.chip", frame);
    const count = one(".count", frame);
    const bodies = [...one("table", frame).tBodies];

    function apply() {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      const pressed = chips.filter((chip) => chip.getAttribute("aria-pressed") === "true");
      const kinds = pressed.map((chip) => chip.dataset.kind);
      for (const body of bodies) {
        const row = body.rows[0];
        const text = row.dataset.words.toLowerCase();
        const isChosen = kinds.length === 0 || kinds.includes(row.dataset.kind);
        body.hidden = !isChosen || !words.every((word) => text.includes(word));
      }
      const kept = bodies.filter((body) => !body.hidden).length;
      const isWhole = kept === bodies.length;
      count.textContent = isWhole ? `${kept} rows` : `${kept} of ${bodies.length} rows`;
    }

    input.addEventListener("input", apply);
    for (const chip of chips) {
      chip.addEventListener("click", () => {
        const isOn = chip.getAttribute("aria-pressed") !== "true";
        chip.setAttribute("aria-pressed", String(isOn));
        apply();
      });
    }
  }

  function unfolding(button) {
    const below = document.getElementById(button.getAttribute("aria-controls"));
    button.addEventListener("click", () => {
      below.hidden = !below.hidden;
      button.setAttribute("aria-expanded", String(!below.hidden));
    });
  }

  // ------------------------------------------------------- places in a drawing

  function placeIn(svg, event) {
    const box = svg.viewBox.baseVal;
    const at = svg.getBoundingClientRect();
    // both directions have one scale, that of the width
    const scale = box.width / at.width;
    return [box.x + (event.clientX - at.left) * scale, box.y + (event.clientY - at.top) * scale];
  }

  function nearest(sorted, value) {
    let best = 0;
    sorted.forEach((other, place) => {
      if (Math.abs(other - value) < Math.abs(sorted[best] - value)) best = place;
    });
    return best;
  }

  // ------------------------------------------------------------------- curves

  function curves(figure) {
    const svg = one("svg", figure);
    const readout = one(".readout", figure);
    const hint = readout.innerHTML;
    const cursor = one(".cursor", svg);
    const hair = one(".hair", cursor);
    const numbers = JSON.parse(one("script", figure).textContent);
    const places = [...new Set(numbers.flatMap((curve) => curve.x))].sort((a, b) => a - b);
    const dots = numbers.map((curve) => {
      const dot = document.createElementNS(SVG, "circle");
      dot.setAttribute("r", "4");
      dot.setAttribute("class", `s${curve.style}`);
      cursor.append(dot);
      return dot;
    });
    const hidden = new Set();
    let current = -1;

    function read(place) {
      current = place;
      const x = places[place];
      hair.setAttribute("transform", `translate(${x} 0)`);
      cursor.setAttribute("visibility", "visible");
      const told = [];
      let at = null;
      numbers.forEach((curve, index) => {
        const near = nearest(curve.x, x);
        const isThere = Math.abs(curve.x[near] - x) <= 3 && !hidden.has(curve.label);
        dots[index].setAttribute("visibility", isThere ? "inherit" : "hidden");
        if (!isThere) return;
        if (curve.x[near] === x) at = curve.at[near];
        dots[index].setAttribute("cx", curve.x[near]);
        dots[index].setAttribute("cy", curve.y[near]);
        told.push([curve, shown(curve.values[near])]);
      });
      readout.replaceChildren(made("b", `${one("text.label", svg).textContent} ${shown(at ?? NaN)}`));
      for (const [curve, value] of told) {
        const word = made("span", "", { class: `value s${curve.style}` });
        word.append(made("i", "", { "aria-hidden": "true" }), `${curve.label} ${value}`);
        readout.append(" ", word);
      }
    }

    function leave() {
      current = -1;
      cursor.setAttribute("visibility", "hidden");
      readout.innerHTML = hint;
    }

    svg.addEventListener("pointermove", (event) => read(nearest(places, placeIn(svg, event)[0])));
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const last = places.length - 1;
      const to = {
        ArrowRight: Math.min(last, current + 1),
        ArrowLeft: current < 0 ? last : Math.max(0, current - 1),
        Home: 0,
        End: last,
      }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      read(to);
    });
    for (const key of all("button.key", figure)) {
      key.addEventListener("click", () => {
        const isOn = key.getAttribute("aria-pressed") !== "true";
        key.setAttribute("aria-pressed", String(isOn));
        hidden[isOn ? "delete" : "add"](key.dataset.label);
        for (const curve of all(".curve", svg)) {
          if (curve.dataset.label === key.dataset.label) curve.classList.toggle("off", !isOn);
        }
      });
    }
  }

  const maps = []; // of distances between blocks: { run, title, unit, between(name, other) }

  // -------------------------------------------------------- spectra of blocks

  // A path of straight pieces, as [[x, y], ...].
  function pointsOf(path) {
    return [...path.getAttribute("d").matchAll(/[ML](-?[\d.]+) (-?[\d.]+)/g)].map(
      ([, x, y]) => [Number(x), Number(y)],
    );
  }

  function heightAt(points, x) {
    for (let place = 1; place < points.length; place += 1) {
      const [right, high] = points[place];
      if (right < x) continue;
      const [left, low] = points[place - 1];
      return right === left ? high : low + ((high - low) * (x - left)) / (right - left);
    }
    return points[points.length - 1][1];
  }

  function blocks(root) {
    const svg = one(".spectra svg", root);
    const table = one(".table table", root);
    const heads = all("thead th", table);
    const rows = [...table.tBodies].map((body) => body.rows[0]); // by number, however they are sorted
    const paths = all("defs path", svg);
    const readout = one(".spectra .readout", root);
    const hint = readout.innerHTML;
    const said = one(".compare .said", root);
    const chosen = { a: null, b: null };
    const kinds = heads.map((head) => head.className);
    let outlines = null; // of all curves, made when the pointer first comes

    const nameOf = (row) => one("button.pick", row).title;
    const shortOf = (row) => one("button.pick", row).lastChild.textContent;
    const titleOf = (head) => (one("button", head)?.firstChild ?? head).textContent;

    function draw(letter, number) {
      const group = one(`.chosen.${letter}`, svg);
      group.setAttribute("visibility", number === null ? "hidden" : "visible");
      if (number === null) return;
      one("use", group).setAttribute("href", `#${paths[number].id}`);
      const { low, high } = paths[number].dataset;
      const bottom = pointsOf(paths[number])[0][1];
      const tall = { a: 12, b: 8, preview: 5 }[letter];
      one(".ends", group).setAttribute("d", `M${low} ${bottom}v-${tall}M${high} ${bottom}v-${tall}`);
    }

    function preview(number) {
      draw("preview", number);
      if (number === null) {
        readout.innerHTML = hint;
        return;
      }
      const row = rows[number];
      readout.replaceChildren(made("b", shortOf(row)));
      heads.forEach((head, column) => {
        if (kinds[column] !== "number") return;
        readout.append(" ", made("span", `${titleOf(head)} ${row.cells[column].textContent}`, { class: "value" }));
      });
    }

    function ratio(column) {
      const [a, b] = [chosen.a, chosen.b].map((number) => valueOf(rows[number], column));
      const isRatio = typeof a === "number" && typeof b === "number" && b !== 0 && a / b > 0;
      return isRatio ? `${shown(a / b)}×` : "";
    }

    function compare() {
      const both = chosen.a !== null && chosen.b !== null;
      const letters = ["a", "b"].filter((letter) => chosen[letter] !== null);
      const head = made("tr");
      head.append(made("th", "", { scope: "col" }));
      for (const letter of letters) {
        const row = rows[chosen[letter]];
        const cell = made("th", "", { scope: "col", class: letter, title: nameOf(row) });
        cell.append(made("span", letter.toUpperCase(), { class: `badge ${letter}` }), breakable(shortOf(row)));
        head.append(cell);
      }
      if (both) head.append(made("th", "A ÷ B", { scope: "col", class: "number" }));
      const lines = [];
      heads.forEach((title, column) => {
        if (kinds[column] !== "number" && kinds[column] !== "text") return;
        const line = made("tr");
        line.append(made("th", titleOf(title), { scope: "row" }));
        for (const letter of letters) {
          line.append(made("td", rows[chosen[letter]].cells[column].textContent, { class: "number" }));
        }
        if (both) line.append(made("td", "ratio" in title.dataset ? ratio(column) : "", { class: "number" }));
        lines.push(line);
      });
      if (both) {
        const names = [nameOf(rows[chosen.a]), nameOf(rows[chosen.b])];
        for (const map of maps.filter((other) => other.run === root.closest(".run"))) {
          const distance = map.between(...names);
          if (distance === null) continue;
          const line = made("tr");
          const told = made("td", `${shown(distance)} ${map.unit}`, { class: "number", colspan: "2" });
          const head = made("th", map.title.toLowerCase(), { scope: "row", colspan: "2" });
          line.append(head, told);
          lines.push(line);
        }
      }
      one(".compare thead", root).replaceChildren(head);
      one(".compare tbody", root).replaceChildren(...lines);
      said.textContent = both
        ? `Comparing ${shortOf(rows[chosen.a])} (A) with ${shortOf(rows[chosen.b])} (B).`
        : "Choose one block more to compare.";
      if (letters.length === 0) said.textContent = "Choose two blocks to compare.";
    }

    function mark() {
      for (const row of rows) {
        const number = Number(row.dataset.number);
        const letter = ["a", "b"].find((other) => chosen[other] === number);
        const button = one("button.pick", row);
        button.setAttribute("aria-pressed", String(letter !== undefined));
        const badge = one(".badge", button);
        badge.textContent = letter ? letter.toUpperCase() : "";
        badge.className = letter ? `badge ${letter}` : "badge";
      }
      draw("a", chosen.a);
      draw("b", chosen.b);
      compare();
    }

    function choose(a, b) {
      [chosen.a, chosen.b] = [a, b];
      mark();
    }

    function toggle(number) {
      if (chosen.a === number) choose(chosen.b, null);
      else if (chosen.b === number) choose(chosen.a, null);
      else if (chosen.a === null) choose(number, null);
      else if (chosen.b === null) choose(chosen.a, number);
      else choose(number, null); // a new pair begins
    }

    function curveAt(event) {
      outlines ??= paths.map(pointsOf);
      const [x, y] = placeIn(svg, event);
      let best = null;
      let distance = 14;
      outlines.forEach((points, number) => {
        if (rows[number].parentElement.hidden) return;
        const away = Math.abs(heightAt(points, x) - y);
        if (away < distance) [best, distance] = [number, away];
      });
      return best;
    }

    svg.addEventListener("pointermove", (event) => preview(curveAt(event)));
    svg.addEventListener("pointerleave", () => preview(null));
    svg.addEventListener("click", (event) => {
      const number = curveAt(event);
      if (number !== null) toggle(number);
    });
    const numberOf = (event) => {
      const row = event.target.closest("tbody > tr");
      return row ? Number(row.dataset.number) : null;
    };
    table.addEventListener("pointerover", (event) => preview(numberOf(event)));
    table.addEventListener("pointerleave", () => preview(null));
    table.addEventListener("focusin", (event) => preview(numberOf(event)));
    table.addEventListener("focusout", () => preview(null));
    table.addEventListener("click", (event) => {
      const number = numberOf(event);
      if (number !== null) toggle(number);
    });
    one("button.clear", root).addEventListener("click", () => choose(null, null));
    document.addEventListener("compare", ({ detail }) => {
      if (detail.run !== root.closest(".run")) return;
      const numbers = detail.names.map((name) => rows.findIndex((row) => nameOf(row) === name));
      if (numbers.includes(-1)) return;
      choose(...numbers);
      one(".spectra", root).scrollIntoView({ block: "nearest" });
    });
    choose(...root.dataset.pair.split(" ").map(Number));
  }

  // ---------------------------------------------------------------- heat maps

  function triangle(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return new Uint16Array(bytes.buffer);
  }

  function joined(figure, names) {
    const detail = { run: figure.closest(".run"), names };
    document.dispatchEvent(new CustomEvent("compare", { detail }));
  }

  function heatMap(figure) {
    const data = one("script", figure);
    if (!data) return;
    const svg = one("svg", figure);
    const readout = one(".readout", figure);
    const hint = readout.innerHTML;
    const { names, numbers } = JSON.parse(data.textContent);
    const count = names.length;
    const shares = triangle(numbers);
    const [low, high] = [Number(figure.dataset.low), Number(figure.dataset.high)];
    const isLog = figure.dataset.log === "1";
    const cursor = one(".cursor", svg);
    const whole = Number(one("image", svg).getAttribute("width"));
    const side = whole / count;
    let cell = null;

    function valueAt(i, j) {
      const [row, column] = i < j ? [i, j] : [j, i];
      // rows of the upper triangle: count, count - 1, ...
      const share = shares[row * count - (row * (row - 1)) / 2 + (column - row)];
      if (share === 65535) return NaN;
      const part = share / 65534;
      return isLog ? low * (high / low) ** part : low + part * (high - low);
    }

    const places = new Map(names.map((name, place) => [name, place]));
    if ("joins" in figure.dataset) {
      maps.push({
        run: figure.closest(".run"),
        title: one("figcaption", figure).textContent,
        unit: figure.dataset.unit,
        between: (name, other) =>
          places.has(name) && places.has(other) ? valueAt(places.get(name), places.get(other)) : null,
      });
    }

    function box(selector, x, y, width, height) {
      const element = one(selector, cursor);
      for (const [name, value] of Object.entries({ x, y, width, height })) element.setAttribute(name, value);
    }

    function read(i, j) {
      cell = [i, j];
      cursor.setAttribute("visibility", "visible");
      box(".row", 0, i * side, whole, side);
      box(".column", j * side, 0, side, whole);
      box(".cell", j * side, i * side, side, side);
      const value = valueAt(i, j);
      const isLowest = isLog && value <= low * (1 + 1e-9);
      const told = Number.isFinite(value) ? `${isLowest ? "≤ " : ""}${shown(value)} ${figure.dataset.unit}` : "not known";
      readout.replaceChildren(made("b", told), " ", made("span", `${names[i]} × ${names[j]}`, { class: "value" }));
    }

    function leave() {
      cell = null;
      cursor.setAttribute("visibility", "hidden");
      readout.innerHTML = hint;
    }

    function cellAt(event) {
      const [x, y] = placeIn(svg, event);
      const [i, j] = [Math.floor(y / side), Math.floor(x / side)];
      return i >= 0 && j >= 0 && i < count && j < count ? [i, j] : null;
    }

    const goesOn = () => {
      if (cell && cell[0] !== cell[1] && "joins" in figure.dataset) joined(figure, cell.map((k) => names[k]));
    };
    svg.addEventListener("pointermove", (event) => {
      const at = cellAt(event);
      if (at) read(...at);
      else leave();
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("click", goesOn);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (event.key === "Enter") goesOn();
      if (!step) return;
      event.preventDefault();
      const from = cell ?? [0, 0];
      const to = cell ? from.map((k, axis) => Math.min(count - 1, Math.max(0, k + step[axis]))) : from;
      read(...to);
    });
  }

  // ------------------------------------------------------- commands, printing

  function copied(button) {
    const code = one("code", button.parentElement);
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code); // for the reader to copy
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  function unfoldForPrint() {
    let folded = [];
    addEventListener("beforeprint", () => {
      folded = all("details:not([open])");
      for (const details of folded) details.open = true;
    });
    addEventListener("afterprint", () => {
      for (const details of folded) details.open = false;
    });
  }

  all(".scroll > table").forEach(sortable);
  all("[data-table]").forEach(filterable);
  all("[data-curves]").forEach(curves);
  all("[data-map]").forEach(heatMap);
  all("[data-blocks]").forEach(blocks);
  all("button.unfold").forEach(unfolding);
  all("button.copy").forEach(copied);
  for (const button of all("button.join")) {
    button.addEventListener("click", () => joined(button, [button.dataset.first, button.dataset.second]));
  }
  unfoldForPrint();
})();
