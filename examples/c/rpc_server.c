/* An RPC server: answers each call for an identifier with its body.
 *
 *     rpc_server CONFIG IDENTIFIER
 *
 * It ends by SIGTERM or SIGINT. Whether its pipe, its entry and its lock are still there it does not look (L7): where
 * somebody has removed one, it is to be ended and started again.
 */
#include "namedpipe.h"

static char *quoted(const char *identifier) /* C2 */
{
    char *text = malloc(3 * strlen(identifier) + 1), *to = text;
    for (const char *at = identifier; *at; at++) {
        int plainly = strchr("abcdefghijklmnopqrstuvwxyz0123456789._~-", *at) && !(*at == '.' && at == identifier);
        to += plainly ? sprintf(to, "%c", *at) : sprintf(to, "%%%02x", (unsigned char)*at);
    }
    if (to == text || to - text > 200)
        die("this program has no SHA-256 for an identifier of that length");
    return text;
}

static void serve(char *message, const char *identifier)
{
    char *to = message ? plain(field(message, "to")) : NULL, *body = message ? field(message, "body") : NULL;
    if (body && to && !strcmp(to, identifier))
        answer(message, "result", body);
    else if (message && is_object(message))
        answer(message, "undelivered", "\"nobody here is called so\""); /* C5 */
    else if (message)
        answer(message, "exception", "\"the message cannot be read\"");
    free(message), free(to), free(body);
}

static void serve_bodies(struct reader *calls, const char *identifier) /* M4: those that nobody has rung for */
{
    for (char *message; (message = next_body(calls));)
        serve(message, identifier);
}

int main(int count, char **arguments)
{
    static struct reader calls, answers;
    char name[128];
    if (count < 3)
        die("usage: rpc_server CONFIG IDENTIFIER");
    end_by_signals();
    find_directories(arguments[1]);
    lock_id();
    sprintf(name, "rpc_%s", worker_id);
    read_from(&answers, reply);
    read_from(&calls, name);
    come(",\"rpc\":true");
    char *id = quoted(arguments[2]), *route = text_of("%s/route_%s", pipes, id);
    if (symlink(name, route)) /* C1: EEXIST for all but one */
        die("%s is taken: %s", arguments[2], strerror(errno));
    printf("ready\n");
    fflush(stdout);
    while (!is_over()) {
        serve(next(&calls, 1000), arguments[2]);
        if (is_time_to_look())
            serve_bodies(&calls, arguments[2]);
    }
    unlink(route); /* L6: nobody finds us any more; what has come is answered (C5) */
    over[0] = 0;
    for (char *message; (message = next(&calls, 0));)
        serve(message, arguments[2]);
    serve_bodies(&calls, arguments[2]);
    leave(name);
    free(id), free(route);
    return 0;
}
