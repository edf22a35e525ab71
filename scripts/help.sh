# Sourced by the other scripts: --help shows the comment at a script's beginning, and ends it.

case "${1:-}" in -h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit ;;
esac
