// Chinese is written without blanks: it is searched for by pairs of characters, as conf.py indexes it.
function splitQuery(query) {
  const runs = query.match(/[一-鿿]{2,}/g) ?? [];
  const pairs = runs.flatMap((run) => [...run].slice(1).map((character, at) => run[at] + character));
  return [...(query.match(/[a-zA-Z0-9_]+/g) ?? []), ...pairs];
}
