# Sourced by the demos, with their flags: --help prints what a script says of itself, from its second
# line to the one that begins with "set", and ends it.
# shellcheck shell=bash
case " $* " in
*" --help "* | *" -h "*)
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
  exit
  ;;
esac
