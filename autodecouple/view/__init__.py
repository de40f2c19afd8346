"""How a plan and a timeline are shown: tables, drawings, pages, trace files; no torch."""
