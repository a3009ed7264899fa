// What the site's own search answers: node search.js HTML-FOLDER < queries as a JSON list > a list of page names each.
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const folder = process.argv[2];
const nothing = new Proxy(function () {}, { get: (_, name) => (name === Symbol.toPrimitive ? () => "" : nothing),
  apply: () => nothing, set: () => true });
const page = { getElementById: () => null, documentElement: { dataset: {} }, addEventListener: () => {},
  querySelectorAll: () => [], createElement: () => nothing };
const context = vm.createContext({ document: page, window: {}, console, URLSearchParams, Set, Map,
  DOCUMENTATION_OPTIONS: {}, _: (text) => text, Documentation: nothing, _ready: () => {}, SPHINX_HIGHLIGHT_ENABLED: false,
  localStorage: { removeItem: () => {}, setItem: () => {} } });
context.window = context;
for (const name of ["language_data.js", "searchtools.js"]) {
  vm.runInContext(fs.readFileSync(path.join(folder, "_static", name), "utf8"), context, { filename: name });
}
vm.runInContext(fs.readFileSync(path.join(folder, "searchindex.js"), "utf8"), context);
context.queries = JSON.parse(fs.readFileSync(0, "utf8"));
const found = vm.runInContext(
  `queries.map((query) => {
    const [, terms, excluded, highlight, objects] = Search._parseQuery(query);
    return Search._performSearch(query, terms, excluded, highlight, objects).map((hit) => hit[0]).reverse(); // the page shows the last one first
  })`, context);
console.log(JSON.stringify(found));
