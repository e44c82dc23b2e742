"""Commands beside training; `cli.TOOLS` lists them."""
