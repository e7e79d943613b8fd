#!/bin/sh
# Unpacks a package of a Debian release, and the libraries that it needs, into
# the directory root here. Usage: unpack.sh RELEASE PACKAGE PROGRAM
#
# redis-server here runs PROGRAM under that name, by the release's own loader and
# libraries, so that it works on any other release. A server and its tools are
# one program, which looks at its name: valkey-check-rdb is valkey-server, too.
set -eu
release=$1 package=$2 program=$3

# The mirror is this machine's own. All of apt's files are here.
mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep '/debian/$' | head -n 1)
[ -n "$mirror" ] || { echo "this machine has no Debian mirror among its apt sources" >&2; exit 1; }
mkdir -p apt/lists/partial apt/archives/partial root
: >apt/status
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release main" >apt/sources.list
cat >apt/apt.conf <<END
Dir::State "$PWD/apt";
Dir::State::lists "$PWD/apt/lists";
Dir::State::status "$PWD/apt/status";
Dir::Cache "$PWD/apt";
Dir::Etc::sourcelist "$PWD/apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
END
export APT_CONFIG="$PWD/apt/apt.conf"
apt-get update -qq

wanted=$package new=$package
while [ -n "$new" ]; do
  # shellcheck disable=SC2086 # a list of names
  found=$(apt-cache depends --important $new | sed -n 's/^ [ |]Depends: \(lib[^ ]*\)$/\1/p')
  new=
  for library in $found; do
    case " $wanted " in
    *" $library "*) ;;
    *) wanted="$wanted $library" new="$new $library" ;;
    esac
  done
done
# shellcheck disable=SC2086
(cd apt/archives && apt-get download -qq $wanted)
for file in apt/archives/*.deb; do
  dpkg-deb -x "$file" root
done
rm -r apt

ln -s "$program" root/usr/bin/redis-server
cat >redis-server <<'END'
#!/bin/sh
here=$(dirname "$0")/root
for libraries in "$here"/lib/*-linux-gnu "$here"/usr/lib/*-linux-gnu; do
  path=${path:+$path:}$libraries
  for loader in "$libraries"/ld-linux-*.so.*; do
    [ ! -x "$loader" ] || exec_by=$loader
  done
done
exec "$exec_by" --library-path "$path" "$here/usr/bin/redis-server" "$@"
END
chmod +x redis-server
