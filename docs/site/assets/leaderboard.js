// The leaderboard as tables that can be sorted and filtered. The data are eval/leaderboard.json, which docs/site/pages.py
// puts into leaderboard-data.js, as pages that are opened from a disk may not fetch files.
(() => {
  const shown = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
  const time = (seconds) => {
    if (seconds === null || seconds === undefined) return "–";
    if (seconds < 1) return "< 1 s";
    return seconds < 120 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
  };
  const element = (name, text = "", attributes = {}) => {
    const made = document.createElement(name);
    made.textContent = text;
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    return made;
  };

  // Published systems are rows too, whose cells are plain numbers.
  const rowsOf = (table) => [
    ...table.rows,
    ...table.published.map((row) => ({
      model: row.model,
      type: "published",
      pretrained: "",
      source: row.source,
      cells: row.cells.map((value) => (value === null ? null : { value })),
    })),
  ];

  const columnsOf = (table) => [
    { head: "model", text: (row) => row.model, note: (row) => row.source || "" },
    ...table.columns.map((column, place) => ({
      head: column.title,
      key: (row) => (row.cells[place] ? row.cells[place].value : null),
      text: (row) => shown(row.cells[place] && row.cells[place].value, 4),
      bold: (row) => Boolean(row.cells[place] && row.cells[place].best),
      note: (row) => {
        const cell = row.cells[place];
        return cell && typeof cell.low === "number" ? `95 % over users: ${shown(cell.low, 4)} to ${shown(cell.high, 4)}` : "";
      },
      best: table.lower ? 1 : -1,
    })),
    { head: "mean rank", key: (row) => row.mean_rank, text: (row) => shown(row.mean_rank, 1), best: 1 },
    { head: "type", text: (row) => row.type },
    { head: "pretrained", text: (row) => row.pretrained || "–" },
    { head: "training", key: (row) => row.training, text: (row) => time(row.training), best: 1 },
    { head: "ms per request", key: (row) => row.answer, text: (row) => shown(row.answer, 1), best: 1 },
  ];

  const build = (table) => {
    const box = element("div", "", { class: "leaderboard" });
    const rows = rowsOf(table);
    const columns = columnsOf(table);
    const search = element("input", "", { type: "search", placeholder: "Filter by name", "aria-label": "Filter by name" });
    const type = element("select", "", { "aria-label": "Type of model" });
    type.append(element("option", "all types", { value: "" }));
    [...new Set(rows.map((row) => row.type))].forEach((name) => type.append(element("option", name, { value: name })));
    const grid = element("table");
    const head = element("tr");
    const body = element("tbody");
    let sorted = null;
    let sign = 1;

    const draw = () => {
      const wanted = search.value.toLowerCase();
      let kept = rows.filter((row) => (!type.value || row.type === type.value) && row.model.toLowerCase().includes(wanted));
      if (sorted) {
        const key = sorted.key || sorted.text;
        const empty = (row) => key(row) === null || key(row) === undefined;
        kept = [...kept].sort((one, other) => {
          if (empty(one) || empty(other)) return empty(one) - empty(other);
          return sign * (key(one) < key(other) ? -1 : key(one) > key(other) ? 1 : 0);
        });
      }
      body.replaceChildren(
        ...kept.map((row) => {
          const line = element("tr", "", row.type === "published" ? { class: "published" } : {});
          columns.forEach((column) => {
            const cell = element("td", column.text(row), column.key ? { class: "number" } : {});
            if (column.bold && column.bold(row)) cell.classList.add("best");
            if (column.note && column.note(row)) cell.title = column.note(row);
            line.append(cell);
          });
          return line;
        }),
      );
      [...head.children].forEach((cell, place) => {
        const own = columns[place] === sorted;
        cell.setAttribute("aria-sort", own ? (sign > 0 ? "ascending" : "descending") : "none");
      });
    };

    columns.forEach((column) => {
      const cell = element("th", "", column.key ? { class: "number" } : {});
      const button = element("button", column.head, { type: "button" });
      button.addEventListener("click", () => {
        sign = sorted === column ? -sign : column.best || 1;
        sorted = column;
        draw();
      });
      cell.append(button);
      head.append(cell);
    });
    search.addEventListener("input", draw);
    type.addEventListener("change", draw);
    const top = element("thead");
    top.append(head);
    grid.append(top, body);
    const controls = element("p");
    controls.append(search, type);
    const pages = element("p", "Details: ");
    table.columns.forEach((column, place) => {
      pages.append(place ? " · " : "", element("a", column.title, { href: column.page }));
    });
    const scroller = element("div", "", { class: "scroller" });
    scroller.append(grid);
    box.append(controls, scroller, pages);
    draw();
    return box;
  };

  const enhance = () => {
    if (!window.LEADERBOARD) return;
    const title = document.querySelector("h1");
    if (!title || !title.textContent.startsWith("Leaderboard")) return;
    const tables = [...document.querySelectorAll("article table, main table")];
    window.LEADERBOARD.forEach((table, place) => {
      const old = tables[place];
      if (old) (old.closest(".md-typeset__scrollwrap") || old).replaceWith(build(table));
    });
  };

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", enhance);
  else enhance();
})();
