# Run a command that can see only the given directories, read-only, and an empty /tmp.
#
# sh jail.sh MEGABYTES USER DIRECTORY... -- COMMAND...
#
# Run this in new mount, PID and network namespaces, as their root. USER is the user id for the command, - to keep the current one.
set -e
size=$1 user=$2
shift 2
root=/tmp
mount -t tmpfs -o "size=${size}m,mode=755" jail $root
mkdir $root/old $root/proc $root/tmp
while [ "$1" != -- ]; do
    if [ -L "$1" ]; then
        cp -P "$1" "$root$1"
    elif [ -d "$1" ]; then
        mkdir -p "$root$1"
        mount --rbind "$1" "$root$1"
        mount -o remount,bind,ro "$root$1"
    elif [ -e "$1" ]; then
        mkdir -p "$root${1%/*}"
        : > "$root$1"
        mount --bind "$1" "$root$1"
        mount -o remount,bind,ro "$root$1"
    fi
    shift
done
shift
chmod 1777 $root/tmp
# umount needs /proc.
mount --rbind /proc $root/proc
cd $root
pivot_root . old
umount -l /old
umount -l /proc
cd /tmp
set -- --no-new-privs --inh-caps=-all --bounding-set=-all -- "$@"
if [ "$user" != - ]; then
    set -- --reuid "$user" --regid "$user" --clear-groups "$@"
fi
exec setpriv "$@"
