// Loads a credits.json by the rules that the old ledger documents, and prints the rows that it then has, as JSON.
// A file that JSON.parse does not take, or that has no rows, ends it with 1: the old ledger would start empty.
import { readFileSync } from "node:fs";

const [, , path, now] = process.argv;
const file = JSON.parse(readFileSync(path, "utf8"));
if (typeof file?.rows !== "object" || file.rows === null) process.exit(1);

function periodStart(row) {
  if (row.last_renewal_at) return row.last_renewal_at; // it is in the new shape already
  const month = /^(\d{4})-(\d{2})$/.exec(typeof row.month === "string" ? row.month : "");
  return month ? new Date(Date.UTC(Number(month[1]), Number(month[2]) - 1, 1)).toISOString() : now;
}

const rows = {};
for (const [installId, { month, ...row }] of Object.entries(file.rows)) {
  const began = periodStart({ month, ...row });
  rows[installId] = { ...row, last_renewal_at: began };
  if (row.last_renewal_at && month !== undefined) rows[installId].month = month;
  if (Number.isNaN(new Date(began).getTime())) throw new Error(`${installId} has no period`);
}
process.stdout.write(JSON.stringify(rows));
