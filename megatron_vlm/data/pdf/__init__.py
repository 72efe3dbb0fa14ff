"""PDF as training data: pages with covered text to be read, and interleaved text and pictures.

`masked` and `interleaved` make drafts of one document, `source` reads files and folders. The PDF
library runs in child processes (`pool`, `child`), which may crash or hang without harm. `pages`
and all that it stands on run there, so they import no torch.
"""
