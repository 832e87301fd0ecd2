"use strict";
(() => {
  const status = document.getElementById("sorted");

  function value(cell) {
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  }

  function compare(a, b, numeric, sign) {
    if (!numeric) return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null); // what is missing stays last
    return sign * (x - y);
  }

  function sort(table, heading) {
    const column = heading.cellIndex;
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    const body = table.tBodies[0];
    const numeric = heading.classList.contains("num");
    const rows = [...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column], numeric, ascending ? 1 : -1));
    body.append(...rows);
    for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    status.textContent = `Sorted by ${heading.textContent}, ${ascending ? "ascending" : "descending"}`;
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    if (table.tBodies[0].rows.length < 2) continue;
    for (const heading of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      button.addEventListener("click", () => sort(table, heading));
      heading.append(button);
      heading.setAttribute("aria-sort", "none");
    }
  }

  // A link to something inside a closed part opens it; printing opens everything.
  function reveal() {
    const target = location.hash.length > 1 ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
    for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  }
  window.addEventListener("hashchange", reveal);
  reveal();
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const part of closed) part.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const part of closed) part.open = false;
  });
})();
