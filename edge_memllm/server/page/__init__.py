"""The page that a server shows at its root: HTML, style and script, as files of the package."""
