# Run a command that can see only the given directories, read-only, and an empty /tmp.
#
# sh jail.sh MEGABYTES USER PATH... -- COMMAND...
#
# Run this in new mount, PID and network namespaces, as their root. USER is the user id for the command, - to keep the current one.
# Every tool that is started takes milliseconds of every program: what one call can do is one call.
set -e
size=$1 user=$2
shift 2
root=/tmp
# Lists of paths, which are split at newlines alone.
IFS='
'
links='' folders=''
mount -t tmpfs -o "size=${size}m,mode=755" jail $root
for path in "$@"; do
    if [ "$path" = -- ]; then
        break
    elif [ -L "$path" ]; then
        links="$links$path$IFS"
    elif [ -d "$path" ]; then
        folders="$folders$root$path$IFS"
    elif [ -e "$path" ]; then
        folders="$folders$root${path%/*}$IFS"
    fi
done
mkdir -p $root/old $root/proc $folders
mkdir -m 1777 $root/tmp
[ -z "$links" ] || cp -P $links $root/
while [ "$1" != -- ]; do
    if [ ! -L "$1" ] && [ -d "$1" ]; then
        mount -o rbind,ro "$1" "$root$1"
    elif [ ! -L "$1" ] && [ -e "$1" ]; then
        : > "$root$1"
        mount -o bind,ro "$1" "$root$1"
    fi
    shift
done
shift
# umount needs /proc.
mount --rbind /proc $root/proc
cd $root
pivot_root . old
umount -l /old /proc
cd /tmp
set -- --no-new-privs --inh-caps=-all --bounding-set=-all -- "$@"
if [ "$user" != - ]; then
    set -- --reuid "$user" --regid "$user" --clear-groups "$@"
fi
exec setpriv "$@"
