# Sourced by the recipes: what they share.

# recipe_address URL: sets host and port of http://HOST:PORT, which is what the seeds' commands take.
recipe_address() {
  if [[ $1 =~ ^http://(\[[0-9a-fA-F:.]+\]|[^/:]+):([0-9]+)/?$ ]]; then
    host=${BASH_REMATCH[1]} port=${BASH_REMATCH[2]}
  else
    echo "${0##*/}: URL is http://HOST:PORT of the proxy, not '$1'" >&2
    exit 2
  fi
}

# recipe_needs COMMAND HOW: ends where COMMAND is not on PATH.
recipe_needs() {
  command -v "$1" > /dev/null || { echo "${0##*/}: $1 is not on PATH: $2" >&2; exit 1; }
}
