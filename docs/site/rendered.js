// Checks of the page that is shown, each returning what is wrong, a line each; docs/site/rendered.py runs them.
({
  // Text that is hard to read, content beyond the window, images without a description or a file.
  look() {
    const problems = [];
    const width = document.documentElement.clientWidth;
    const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const colours = new Map();
    const rgba = (text) => {
      if (!colours.has(text)) {
        paint.clearRect(0, 0, 1, 1);
        paint.fillStyle = text;
        paint.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data;
        colours.set(text, [r, g, b, a / 255]);
      }
      return colours.get(text);
    };
    const over = (top, below) => [0, 1, 2].map((part) => top[part] * top[3] + below[part] * (1 - top[3])).concat(1);
    const grounds = new WeakMap();
    const ground = (element) => {
      if (!element) return matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18, 1] : [255, 255, 255, 1];
      if (!grounds.has(element)) {
        const own = rgba(getComputedStyle(element).backgroundColor);
        grounds.set(element, own[3] === 1 ? own : over(own, ground(element.parentElement)));
      }
      return grounds.get(element);
    };
    const light = (colour) => {
      const [r, g, b] = colour.map((part) => ((part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (one, other) => {
      const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
      return (high + 0.05) / (low + 0.05);
    };
    const say = (text) => text.replace(/\s+/g, " ").trim().slice(0, 40);

    // WCAG 2.2, level AA: 4.5, and 3 for large text.
    const pairs = new Map();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const seen = new Set();
    while (walker.nextNode()) {
      const element = walker.currentNode.parentElement;
      if (!walker.currentNode.data.trim() || seen.has(element)) continue;
      seen.add(element);
      const box = element.getBoundingClientRect();
      const shown = element.checkVisibility({ opacityProperty: true, visibilityProperty: true, contentVisibilityAuto: true });
      if (!shown || box.width < 2 || box.height < 2 || element.closest("script, style, :disabled, .headerlink")) continue;
      const style = getComputedStyle(element);
      const size = parseFloat(style.fontSize);
      const needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
      const back = ground(element);
      const ink = over(rgba(element instanceof SVGElement ? style.fill : style.color), back);
      const key = [ink, back, needed].join();
      if (!pairs.has(key)) pairs.set(key, [contrast(ink, back), needed, walker.currentNode.data, element]);
    }
    for (const [found, needed, text, element] of pairs.values())
      if (found < needed - 0.05)
        problems.push(`contrast ${found.toFixed(2)} of <${element.localName} class="${element.className}"> "${say(text)}"`);

    if (document.documentElement.scrollWidth > width) problems.push(`${document.documentElement.scrollWidth} pixels wide`);
    const scrolls = (element) => {
      for (let each = element.parentElement; each && each !== document.body; each = each.parentElement)
        if (/auto|scroll|hidden|clip/.test(getComputedStyle(each).overflowX)) return true;
      return false;
    };
    for (const element of document.querySelectorAll("table, pre, img, iframe, svg, h1, h2, h3, p")) {
      const box = element.getBoundingClientRect();
      if (box.width && box.height && box.right > width + 1 && element.checkVisibility() && !scrolls(element))
        problems.push(`<${element.localName}> reaches ${Math.round(box.right - width)} pixels beyond the window`);
    }
    for (const image of document.images) {
      if (!image.alt.trim()) problems.push(`no alternative text: ${image.getAttribute("src")}`);
      if (image.complete && !image.naturalWidth) problems.push(`not shown: ${image.getAttribute("src")}`);
    }
    return problems;
  },

  // The start page leads to the three uses.
  start() {
    const links = [...document.querySelectorAll("article table a")].map((link) => link.getAttribute("href"));
    const wanted = ["your-data.html", "benchmark.html", "quickstart.html"];
    return wanted.filter((page) => !links.includes(page)).map((page) => `no link to ${page}`);
  },

  // Sorting a board by a data set orders its figures, and filters leave the rows of a type or with a word.
  leaderboard() {
    const boards = [...document.querySelectorAll(".leaderboard")];
    const problems = [];
    if (boards.length !== window.LEADERBOARD.length) problems.push(`${boards.length} boards that can be sorted`);
    boards.forEach((board, place) => {
      const texts = (row) => [...row.cells].map((cell) => cell.textContent);
      const rows = () => [...board.querySelectorAll("tbody tr")].map(texts);
      const enter = (what, value) => {
        const field = board.querySelector(what);
        field.value = value;
        field.dispatchEvent(new Event(what === "select" ? "change" : "input"));
      };
      const whole = rows().length;
      const type = [...board.querySelectorAll("th")].findIndex((cell) => cell.textContent === "type");
      const some = rows().filter((row) => row[type] === "interactions").length;
      board.querySelectorAll("th button")[1].click();
      const figures = rows().map((row) => parseFloat(row[1])).filter((value) => !isNaN(value));
      const sign = window.LEADERBOARD[place].lower ? 1 : -1;
      if (figures.some((value, at) => at && sign * (value - figures[at - 1]) < 0)) problems.push("a board is not sorted");
      enter("select", "interactions");
      if (!some || rows().length !== some) problems.push("a board is not filtered by type");
      enter("select", "");
      enter("input", "e");
      if (rows().some((row) => !row[0].toLowerCase().includes("e"))) problems.push("a board is not filtered by name");
      enter("input", "no such model");
      if (rows().length) problems.push("a board shows models that were not asked for");
      enter("input", "");
      if (rows().length !== whole) problems.push("a board is not whole without a filter");
    });
    return problems;
  },

  // The search, which is in a shadow tree, lists pages for a word.
  async search() {
    const inside = (what) => [...document.querySelectorAll("body *")].map((each) => each.shadowRoot?.querySelector(what));
    const found = async (what) => {
      for (let times = 0; times < 100; times += 1) {
        const first = inside(what).find(Boolean);
        if (first) return first;
        await new Promise((done) => setTimeout(done, 100));
      }
      return null;
    };
    document.querySelector(".md-search__button").click();
    const box = await found("input[role=combobox]");
    if (!box) return ["no box to type into"];
    box.value = "quickstart";
    box.dispatchEvent(new Event("input", { bubbles: true }));
    return (await found("[role=listbox] a[href*=quickstart]")) ? [] : ["does not find the quickstart"];
  },
})
