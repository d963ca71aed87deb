// Draws the plots of a report. All data comes from the JSON block in the page; labels in it are escaped already.
"use strict";

(function () {
  const data = JSON.parse(document.getElementById("plot-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const SYMBOLS = { "zero-shot": "circle", "few-shot": "diamond", tuned: "triangle-up", baseline: "square" };
  const NARROW = 560; // px; below it, labels stand above their marks instead of beside them

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  }

  function base(height, margin) {
    return {
      height: height,
      margin: margin,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("text") },
      hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("line"), font: { color: colour("text"), size: 13 } },
      dragmode: false,
      showlegend: false,
    };
  }

  function axis(title, more) {
    return Object.assign(
      {
        title: { text: title, font: { size: 13, color: colour("muted") }, standoff: 8 },
        gridcolor: colour("grid"),
        linecolor: colour("line"),
        tickcolor: colour("line"),
        tickfont: { color: colour("muted"), size: 12 },
        zeroline: false,
        fixedrange: true,
        automargin: true,
      },
      more
    );
  }

  function forest(plot, width) {
    const narrow = width < NARROW;
    const rows = plot.rows;
    const step = narrow ? 46 : 34;
    const places = rows.map(function (_, place) { return place; });
    const traces = Object.keys(SYMBOLS).map(function (arm) {
      const mine = places.filter(function (place) { return rows[place].arm === arm; });
      const of = function (key) { return mine.map(function (place) { return rows[place][key]; }); };
      const bound = function (row, key) { return row[key] === null ? 0 : Math.abs(row[key] - row.value); };
      return {
        type: "scatter",
        mode: "markers",
        name: arm,
        x: of("value"),
        y: mine,
        customdata: mine.map(function (place) { return [rows[place].label, rows[place].text]; }),
        hovertemplate: "%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
        marker: { symbol: SYMBOLS[arm], size: arm === "tuned" ? 12 : 10, color: colour(arm) },
        error_x: {
          type: "data",
          symmetric: false,
          array: mine.map(function (place) { return bound(rows[place], "high"); }),
          arrayminus: mine.map(function (place) { return bound(rows[place], "low"); }),
          color: colour(arm),
          thickness: 2,
          width: 4,
        },
      };
    });
    const layout = base(rows.length * step + (narrow ? 102 : 84), { l: narrow ? 8 : 20, r: narrow ? 12 : 24, t: narrow ? 52 : 34, b: 46 });
    layout.xaxis = axis(plot.metric + " (" + plot.better + " is better)", { nticks: narrow ? 5 : 9 });
    layout.yaxis = axis("", {
      range: [rows.length - 0.4, narrow ? -0.85 : -0.6],
      showgrid: false,
      showticklabels: !narrow,
      tickvals: places,
      ticktext: rows.map(function (row) { return row.short; }),
      tickfont: { color: colour("text"), size: 13 },
      ticks: "",
      ticklabelstandoff: 8,
    });
    layout.showlegend = true;
    layout.legend = { orientation: "h", x: 0, xref: "container", y: 1, yref: "container", yanchor: "top", itemclick: false, itemdoubleclick: false, font: { size: 12, color: colour("muted") } };
    layout.shapes = plot.reference === null ? [] : [
      { type: "line", x0: plot.reference, x1: plot.reference, yref: "paper", y0: 0, y1: 1, layer: "below", line: { color: colour("muted"), width: 1.5, dash: "dash" } },
    ];
    layout.annotations = !narrow ? [] : rows.map(function (row, place) {
      return { text: row.short, x: 0, xref: "paper", xanchor: "left", y: place - 0.4, yanchor: "middle", showarrow: false, font: { size: 12 }, bgcolor: colour("surface"), borderpad: 1 };
    });
    return [traces, layout];
  }

  function lines(plot, width) {
    const many = plot.series.length > 1;
    const hues = ["zero-shot", "few-shot", "good", "baseline", "bad"];
    const marks = ["circle", "diamond", "square", "triangle-up", "cross"];
    let valid = 0;
    const traces = plot.series.map(function (series) {
      const held = series.kind === "valid";
      const place = held ? valid++ % hues.length : 0;
      const hue = colour(held ? hues[place] : "tuned");
      return {
        type: "scatter",
        mode: held || series.x.length === 1 ? "lines+markers" : "lines",
        name: series.name,
        x: series.x,
        y: series.y,
        line: { color: hue, width: held ? 1.75 : 2.25, dash: held ? "dot" : "solid" },
        marker: { color: hue, size: 8, symbol: marks[place] },
        hovertemplate: "step %{x}: %{y:.4~g}<extra>%{fullData.name}</extra>",
      };
    });
    const layout = base(many ? 340 + (width < NARROW ? 24 * plot.series.length : 0) : 340, { l: 48, r: 16, t: 12, b: 48 });
    layout.xaxis = axis("optimiser step", { nticks: 7, rangemode: "tozero" });
    layout.yaxis = axis(plot.unit, { rangemode: many ? "normal" : "tozero", nticks: 6 });
    layout.showlegend = many;
    layout.legend = { orientation: "h", x: 0, y: -0.24, yanchor: "top", font: { size: 12, color: colour("muted") } };
    return [traces, layout];
  }

  function budget(plot) {
    const places = plot.stages.map(function (_, place) { return place; });
    const traces = [{
      type: "bar",
      orientation: "h",
      y: places,
      x: plot.stages.map(function (stage) { return stage.seconds; }),
      text: plot.stages.map(function (stage) { return stage.text; }),
      textposition: "outside",
      cliponaxis: false,
      textfont: { color: colour("text"), size: 12 },
      customdata: plot.stages.map(function (stage) { return stage.label; }),
      hovertemplate: "%{customdata}: %{text}<extra></extra>",
      marker: { color: colour("zero-shot") },
      width: 0.62,
    }];
    const layout = base(plot.stages.length * 34 + 66, { l: 20, r: 84, t: 8, b: 46 });
    layout.xaxis = axis("seconds", { rangemode: "tozero", nticks: 6 });
    layout.yaxis = axis("", { tickvals: places, ticktext: plot.stages.map(function (stage) { return stage.short; }), autorange: "reversed", showgrid: false, ticks: "", ticklabelstandoff: 8, tickfont: { color: colour("text"), size: 13 } });
    return [traces, layout];
  }

  function bounds(values, lows, highs, hue) {
    const reach = function (ends) {
      return values.map(function (value, place) { return ends[place] === null ? 0 : Math.abs(ends[place] - value); });
    };
    return { type: "data", symmetric: false, array: reach(highs), arrayminus: reach(lows), color: hue, thickness: 1.5, width: 3 };
  }

  // One panel a row and measure; all panels of a measure share their range, so that they can be compared.
  function positions(plot, width) {
    const left = 52, right = 12, gap = 18, head = 40, body = 112, foot = 30;
    const most = Math.max(1, Math.floor((width - left - right + gap) / (width < NARROW ? 140 : 210)));
    const lines = Math.ceil(plot.panels.length / most);
    const columns = Math.ceil(plot.panels.length / lines);
    const across = width - left - right, one = (across - gap * (columns - 1)) / columns;
    const down = plot.measures.length * lines * (head + body + foot);
    const layout = base(down + 38, { l: left, r: right, t: 6, b: 32 });
    const traces = [];
    layout.annotations = [];
    plot.measures.forEach(function (measure, block) {
      const every = plot.panels.concat(plot.control ? [plot.control] : []);
      const ends = every.reduce(function (found, panel) {
        const own = panel[measure.key];
        return found.concat(own.y, own.low, own.high).filter(function (value) { return value !== null; });
      }, []);
      const low = Math.min.apply(null, ends), high = Math.max.apply(null, ends), room = 0.06 * (high - low || 1);
      plot.panels.forEach(function (panel, place) {
        const column = place % columns, line = block * lines + Math.floor(place / columns);
        const id = String(traces.length ? block * plot.panels.length + place + 1 : "");
        const start = column * (one + gap), top = line * (head + body + foot);
        const last = panel.x[panel.x.length - 1];
        layout["xaxis" + id] = axis("", {
          domain: [start / across, (start + one) / across], anchor: "y" + id, nticks: 5, range: [0, last + 1],
        });
        layout["yaxis" + id] = axis(column ? "" : measure.title, {
          domain: [1 - (top + head + body) / down, 1 - (top + head) / down], anchor: "x" + id, nticks: 4,
          range: [low - room, high + room], showticklabels: column === 0, automargin: false,
        });
        layout.annotations.push({
          text: panel.title.join("<br>"), align: "left", x: start / across, xref: "paper", xanchor: "left", y: 1 - (top + head) / down, yref: "paper",
          yanchor: "bottom", showarrow: false, font: { size: 12 }, borderpad: 2,
        });
        const own = panel[measure.key], hue = colour(panel.arm);
        if (plot.control) {
          traces.push({
            type: "scatter", mode: "lines", x: plot.control.x, y: plot.control[measure.key].y, xaxis: "x" + id, yaxis: "y" + id,
            line: { color: colour("baseline"), width: 1.5, dash: "dash" }, hoverinfo: "skip",
          });
        }
        traces.push({
          type: "scatter", mode: "lines+markers", x: panel.x, y: own.y, xaxis: "x" + id, yaxis: "y" + id,
          line: { color: hue, width: 1.75 }, marker: { color: hue, size: 7, symbol: SYMBOLS[panel.arm] },
          error_y: bounds(own.y, own.low, own.high, hue),
          customdata: panel.names.map(function (name, at) { return [panel.label, name, panel.n[at]]; }),
          hovertemplate: "%{customdata[0]}<br>target at %{customdata[1]}: " + measure.title + " %{y:.3~f}, n = %{customdata[2]}<extra></extra>",
        });
      });
    });
    layout.annotations.push({
      text: "position of the target", x: 0.5, xref: "paper", xanchor: "center", y: 0, yref: "paper", yanchor: "top", yshift: -4,
      showarrow: false, font: { size: 13, color: colour("muted") },
    });
    return [traces, layout];
  }

  function cost(plot, width) {
    const traces = Object.keys(SYMBOLS).map(function (arm) {
      const mine = plot.points.filter(function (point) { return point.arm === arm; });
      const of = function (key) { return mine.map(function (point) { return point[key]; }); };
      return {
        type: "scatter", mode: "markers+text", name: arm, x: of("tokens"), y: of("value"),
        text: of("short"), textposition: "middle right", textfont: { size: 11, color: colour("muted") }, cliponaxis: false,
        customdata: mine.map(function (point) { return [point.label, point.text]; }),
        hovertemplate: "%{customdata[0]}<br>%{customdata[1]} a user<extra></extra>",
        marker: { symbol: SYMBOLS[arm], size: arm === "tuned" ? 12 : 10, color: colour(arm) },
        error_y: bounds(of("value"), of("low"), of("high"), colour(arm)),
      };
    }).filter(function (trace) { return trace.x.length > 0; });
    const layout = base(320, { l: 56, r: 28, t: 40, b: 48 });
    const most = Math.max.apply(null, plot.points.map(function (point) { return point.tokens; }));
    layout.xaxis = axis("tokens a user", { range: [0, most * 1.22], nticks: 6 });
    layout.yaxis = axis(plot.metric + " (" + plot.better + " is better)", { nticks: 6 });
    layout.showlegend = true;
    layout.legend = { orientation: "h", x: 0, xref: "container", y: 1, yref: "container", yanchor: "top", itemclick: false, itemdoubleclick: false, font: { size: 12, color: colour("muted") } };
    if (plot.reference !== null) {
      layout.shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: plot.reference, y1: plot.reference, layer: "below", line: { color: colour("muted"), width: 1.5, dash: "dash" } }];
      layout.annotations = [{ text: plot.control, x: 0, xref: "paper", xanchor: "left", y: plot.reference, yanchor: "bottom", showarrow: false, font: { size: 11, color: colour("muted") } }];
      // An invisible mark keeps the line of the best baseline inside the range.
      traces.push({ type: "scatter", mode: "markers", x: [0], y: [plot.reference], marker: { opacity: 0 }, hoverinfo: "skip", showlegend: false });
    }
    return [traces, layout];
  }

  // One small panel a level: items of each token, most used first.
  function usage(plot, width) {
    const left = 44, right = 12, gap = 44, head = 34, body = 132, foot = 34;
    const most = Math.max(1, Math.floor((width - left - right + gap) / (width < NARROW ? 280 : 240)));
    const lines = Math.ceil(plot.panels.length / most);
    const columns = Math.ceil(plot.panels.length / lines);
    const across = width - left - right, one = (across - gap * (columns - 1)) / columns;
    const down = lines * (head + body + foot);
    const layout = base(down + 32, { l: left, r: right, t: 4, b: 28 });
    const traces = [];
    layout.annotations = [];
    layout.shapes = [];
    plot.panels.forEach(function (panel, place) {
      const id = place ? String(place + 1) : "";
      const start = (place % columns) * (one + gap), top = Math.floor(place / columns) * (head + body + foot);
      // Each token is as wide as one rank; unused ones leave room at the right.
      const ranks = panel.counts.map(function (_, rank) { return rank + 1; });
      layout["xaxis" + id] = axis("", {
        domain: [start / across, (start + one) / across], anchor: "y" + id, nticks: 4, range: [0.5, panel.available + 0.5], showgrid: false, automargin: false,
      });
      layout["yaxis" + id] = axis("", {
        domain: [1 - (top + head + body) / down, 1 - (top + head) / down], anchor: "x" + id, nticks: 4, rangemode: "tozero", automargin: false,
      });
      layout.annotations.push({
        text: panel.title, align: "left", x: start / across, xref: "paper", xanchor: "left", y: 1 - (top + head) / down, yref: "paper",
        yanchor: "bottom", showarrow: false, font: { size: 12 }, borderpad: 4,
      });
      layout.shapes.push({
        type: "line", xref: "x" + id + " domain", yref: "y" + id, x0: 0, x1: 1, y0: panel.even, y1: panel.even, line: { color: colour("muted"), width: 1.5, dash: "dash" },
      });
      traces.push({
        type: "scatter", mode: "lines", x: [0.5].concat(ranks.map(function (rank) { return rank + 0.5; })), y: [panel.counts[0]].concat(panel.counts),
        line: { color: colour("zero-shot"), width: 1.5, shape: "vh" }, fill: "tozeroy", fillcolor: colour("zero-shot-fill"), hoverinfo: "skip", xaxis: "x" + id, yaxis: "y" + id,
      });
      traces.push({
        type: "scatter", mode: "markers", x: ranks, y: panel.counts, marker: { opacity: 0, size: 6 }, xaxis: "x" + id, yaxis: "y" + id,
        customdata: panel.counts.map(function (count) { return (100 * count / panel.items).toPrecision(2); }),
        hovertemplate: "rank %{x}: %{y} items, %{customdata} %<extra></extra>",
      });
    });
    layout.annotations.push({
      text: "token, by rank", x: 0.5, xref: "paper", xanchor: "center", y: 0, yref: "paper", yanchor: "top", yshift: -6, showarrow: false, font: { size: 13, color: colour("muted") },
    });
    return [traces, layout];
  }

  // Two panels over the length of a prefix, side by side where there is room.
  function branching(plot, width) {
    const left = 52, right = 12, gap = 64, head = 34, body = 180, foot = 46;
    const columns = width < NARROW ? 1 : 2, lines = plot.panels.length / columns;
    const across = width - left - right, one = (across - gap * (columns - 1)) / columns;
    const down = lines * (head + body + foot);
    const layout = base(down + 8, { l: left, r: right, t: 4, b: 4 });
    const kinds = [["mean", "circle", "zero-shot"], ["most", "square", "tuned"]];
    const traces = [];
    layout.annotations = [];
    plot.panels.forEach(function (panel, place) {
      const id = place ? String(place + 1) : "";
      const start = (place % columns) * (one + gap), top = Math.floor(place / columns) * (head + body + foot);
      const last = panel.x[panel.x.length - 1];
      layout["xaxis" + id] = axis("length of the prefix", {
        domain: [start / across, (start + one) / across], anchor: "y" + id, dtick: 1, range: [-0.25, last + 0.25], automargin: false,
      });
      layout["yaxis" + id] = axis("", {
        domain: [1 - (top + head + body) / down, 1 - (top + head) / down], anchor: "x" + id, type: "log", dtick: 1, rangemode: "normal", automargin: false,
      });
      layout.annotations.push({
        text: panel.title, align: "left", x: start / across, xref: "paper", xanchor: "left", y: 1 - (top + head) / down, yref: "paper",
        yanchor: "bottom", showarrow: false, font: { size: 12 }, borderpad: 4,
      });
      kinds.forEach(function (kind) {
        const hue = colour(kind[2]);
        traces.push({
          type: "scatter", mode: "lines+markers", x: panel.x, y: panel[kind[0]], xaxis: "x" + id, yaxis: "y" + id, line: { color: hue, width: 1.75 },
          marker: { color: hue, size: 8, symbol: kind[1] }, hovertemplate: kind[0] + ": %{y:.4~g} " + panel.title + " of %{x}<extra></extra>",
        });
      });
    });
    return [traces, layout];
  }

  const KINDS = { forest: forest, lines: lines, budget: budget, positions: positions, cost: cost, usage: usage, branching: branching };

  function draw() {
    Object.keys(data).forEach(function (id) {
      const holder = document.getElementById(id);
      if (!holder) return;
      const fallback = holder.querySelector(".fallback");
      if (fallback) fallback.remove();
      const made = KINDS[data[id].kind](data[id], holder.clientWidth);
      window.Plotly.react(holder, made[0], made[1], { displayModeBar: false, responsive: false, scrollZoom: false, doubleClick: false, typesetMath: false });
    });
  }

  if (!window.Plotly) return;
  draw();
  dark.addEventListener("change", draw);
  let width = document.documentElement.clientWidth;
  let waiting = 0;
  window.addEventListener("resize", function () {
    if (document.documentElement.clientWidth === width) return;
    width = document.documentElement.clientWidth;
    window.clearTimeout(waiting);
    waiting = window.setTimeout(draw, 150);
  });
})();
